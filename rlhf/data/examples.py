"""Rows with their token ids, as the stages use them, and the rules for what is too long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from math import comb
from types import MappingProxyType
from typing import Any, Generic, NamedTuple, TypeVar

from rlhf.config.sections import Reading, TextReading
from rlhf.data.rows import Row, Rows, read_rows
from rlhf.data.shapes import Kind
from rlhf.data.templates import Messages, Template, plain_prompt
from rlhf.errors import DataError

Example = TypeVar("Example")

MANY = 0.2
"""Share of a file's rows above which what is left out or cut for its length is warned of."""


@dataclass(frozen=True)
class SftExample:
    """`trained[t]` says whether token t carries the loss."""

    ids: list[int]
    trained: list[bool]
    where: str = field(default="", compare=False)
    """file:line"""

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PairExample:
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    where: str = field(default="", compare=False)
    """file:line"""
    reference: tuple[float, ...] = ()
    """Log-probabilities of the replies under a reference, where there is one."""

    @property
    def replies(self) -> tuple[list[int], list[int]]:
        return self.chosen, self.rejected

    def __len__(self) -> int:
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


class Comparison(NamedTuple):
    """Of two of a prompt's replies, by their places."""

    better: int
    worse: int
    tie: bool


@dataclass(frozen=True)
class RankedExample:
    """A prompt with replies that were ranked: a pair is two of them."""

    prompt: list[int]
    replies: list[list[int]]
    ranks: list[float]
    """Of each reply; lower is better, equal is a tie."""
    margin: float = 0.0
    """By how much the better reply is to score higher, in units of the score."""
    where: str = field(default="", compare=False)
    """file:line"""
    others: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """Columns of the row that were asked for."""

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Every two replies that are not the same tokens."""
        places = [
            (one, two) for one, two in combinations(range(len(self.replies)), 2) if self.replies[one] != self.replies[two]
        ]
        in_order = ((one, two) if self.ranks[one] <= self.ranks[two] else (two, one) for one, two in places)
        return [Comparison(one, two, self.ranks[one] == self.ranks[two]) for one, two in in_order]

    def __len__(self) -> int:
        return len(self.prompt) + max(map(len, self.replies))


@dataclass(frozen=True)
class RatedExample:
    prompt: list[int]
    reply: list[int]
    desirable: bool
    where: str = field(default="", compare=False)
    """file:line"""
    reference: tuple[float, ...] = ()
    """Log-probability of the reply under a reference, where there is one."""

    @property
    def replies(self) -> tuple[list[int]]:
        return (self.reply,)

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)


@dataclass(frozen=True)
class PromptExample:
    """`index`: the row's place among the file's usable rows; with the step it seeds the replies, whatever rank samples them."""

    index: int
    ids: list[int]
    row: Row

    @property
    def text(self) -> str:
        return plain_prompt(self.row.fields["prompt"])

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Examples(Generic[Example]):
    """What became of a file: examples, and what happened on the way, one sentence each."""

    items: list[Example]
    notes: list[str]
    asked: list[bytes]
    """What each usable row of the file asks (`Row.asks`)."""


def sft_examples(path: str, config: TextReading, template: Template) -> Examples[SftExample]:
    limit = _LengthLimit(config.max_length, config.too_long, "skip, truncate or (plain text: data.json_key) split")
    rows = _read(path, "sft" if config.json_key is None else "text", config, config.json_key)
    examples, untrained = [], 0
    for row in rows.rows:
        ids, trained = sft_tokens(row, template)
        if config.loss_on == "all":
            trained = [True] * len(ids)
        if not limit.allows(len(ids), row.where):
            continue
        if not any(trained[1 : config.max_length]):
            untrained += 1
            continue
        examples += [SftExample(ids[part], trained[part], row.where) for part in limit.parts(len(ids))]
    many = "warning: " if untrained > MANY * len(rows.rows) else ""
    dropped = [f"{many}{untrained} rows dropped: no token is left to train on"] if untrained else []
    lost = config.json_key is not None and limit.hit and config.too_long != "split"
    advice = ["data.too_long: split would use long documents whole"] if lost else []
    return _done(path, examples, rows, limit.notes() + advice + dropped + _no_ends(examples, template.stop_ids))


def _no_ends(examples: Sequence[SftExample], stop_ids: Sequence[int]) -> list[str]:
    """That no row teaches the end of a reply, where that is so."""
    if any(t and i in stop_ids for row in examples for i, t in zip(row.ids, row.trained, strict=True)):
        return []
    return ["warning: the end token is trained in none of the rows: a model made of them never ends its replies"]


def pair_examples(path: str, config: Reading, template: Template) -> Examples[PairExample]:
    limit = _LengthLimit(config.max_length, config.too_long)
    rows = _read(path, "pair", config)
    examples, same = [], 0
    for row in rows.rows:
        prompt, chosen = template.response(row.fields["prompt"], row.fields["chosen"], row.where)
        prompt_again, rejected = template.response(row.fields["prompt"], row.fields["rejected"], row.where)
        if prompt != prompt_again:
            raise DataError(f"{row.where}: the chat template renders the prompt differently for the two replies")
        example = PairExample(prompt, chosen, rejected, row.where)
        if not limit.allows(len(example), row.where, len(example.prompt)):
            continue
        example = _shorten(example, config.max_length)
        if example.chosen == example.rejected:
            same += 1
            continue
        examples.append(example)
    dropped = [f"{same} pairs dropped: chosen and rejected are the same tokens (after truncation)"] if same else []
    return _done(path, examples, rows, limit.notes() + dropped)


def ranked_examples(
    path: str, config: Reading, template: Template, asked: Mapping[str, str] = MappingProxyType({})
) -> Examples[RankedExample]:
    """`asked`: columns that go along with the replies, and who asks for them."""
    limit = _LengthLimit(config.max_length, config.too_long)
    rows = _read(path, "ranking", config, asked=asked)
    examples, same = [], 0
    for row in rows.rows:
        turns = [template.response(row.fields["prompt"], reply, row.where) for reply in row.fields["responses"]]
        prompt = turns[0][0]
        if any(again != prompt for again, _ in turns):
            raise DataError(f"{row.where}: the chat template renders the prompt differently for its replies")
        if not limit.allows(len(prompt) + max(len(reply) for _, reply in turns), row.where, len(prompt)):
            continue
        prompt, replies = _cut(prompt, [reply for _, reply in turns], config.max_length)
        others = {name: row.others[name] for name in asked}
        example = RankedExample(prompt, replies, row.fields["ranks"], row.fields["margin"], row.where, others)
        same += comb(len(replies), 2) - len(example.comparisons)
        if example.comparisons:
            examples.append(example)
    notes = [f"{same} pairs dropped: chosen and rejected are the same tokens (after truncation)"] if same else []
    compared = [comparison for example in examples for comparison in example.comparisons]
    if len(compared) > len(examples):
        replies = sum(len(example.replies) for example in examples)
        notes.append(f"{replies} replies to {len(examples)} prompts make {len(compared)} pairs; a prompt counts once")
    if ties := sum(comparison.tie for comparison in compared):
        notes.append(f"{ties} of {len(compared)} pairs are ties")
    return _done(path, examples, rows, limit.notes() + notes)


def reference_examples(path: str, config: Reading, template: Template) -> Examples[RankedExample]:
    """Rows of prompt and completion, as for SFT: a prompt and its one reply. `config.columns` are those of other files."""
    limit = _LengthLimit(config.max_length, config.too_long)
    rows = _read(path, "sft", config.model_copy(update={"columns": {}}))
    examples = []
    for row in rows.rows:
        if "completion" not in row.fields:
            raise DataError(
                f"{row.where}: a reference answer is a row of prompt and completion, this one has {', '.join(row.fields)}"
            )
        prompt, reply = template.response(row.fields["prompt"], row.fields["completion"], row.where)
        if limit.allows(len(prompt) + len(reply), row.where, len(prompt)):
            prompt, replies = _cut(prompt, [reply], config.max_length)
            examples.append(RankedExample(prompt, replies, [0.0], where=row.where))
    return _done(path, examples, rows, limit.notes())


def rated_examples(path: str, config: Reading, template: Template) -> Examples[RatedExample]:
    """A pair is two rows: the chosen reply, which is desirable, and the rejected one."""
    limit = _LengthLimit(config.max_length, config.too_long)
    rows = _read(path, "rated", config)
    examples, pairs = [], 0
    for row in rows.rows:
        fields = row.fields
        pairs += "chosen" in fields
        rated = {"chosen": True, "rejected": False} if "chosen" in fields else {"completion": fields["label"]}
        for name, desirable in rated.items():
            example = RatedExample(*template.response(fields["prompt"], fields[name], row.where), desirable, row.where)
            if limit.allows(len(example), row.where, len(example.prompt)):
                examples.append(_shortened(example, config.max_length))
    split_up = [f"{pairs} pairs became two rows each, a desirable one and an undesirable one"] if pairs else []
    return _done(path, examples, rows, limit.notes() + split_up)


def mismatched(rows: Sequence[RatedExample], limit: int) -> list[RatedExample]:
    """Each row's prompt with the reply of the row before it (of the first, the last) that has another prompt.

    Args:
        limit: longest prompt + reply, in tokens; replies are cut at their end.

    Raises:
        DataError: there is one prompt only.
    """
    if all(row.prompt == rows[0].prompt for row in rows):
        raise DataError(f"{rows[0].where}: all rows have the same prompt; KTO compares with replies to other prompts: add some")
    before = [-1] * len(rows)
    for place in range(2 * len(rows)):  # the second time around, the first rows find those at the end
        row, last = place % len(rows), (place - 1) % len(rows)
        before[row] = last if rows[last].prompt != rows[row].prompt else before[last]
    return [_shortened(replace(row, reply=rows[other].reply), limit) for row, other in zip(rows, before, strict=True)]


def prompt_examples(
    path: str, config: Reading, template: Template, asked: Mapping[str, str] = MappingProxyType({})
) -> Examples[PromptExample]:
    """`asked`: columns that go along with the prompts, and who asks for them."""
    limit = _LengthLimit(config.max_length, config.too_long)
    rows = _read(path, "prompt", config, asked=asked)
    examples = []
    for index, row in enumerate(rows.rows):
        ids = template.prompt(row.fields["prompt"], row.where)
        if limit.allows(len(ids), row.where):
            examples.append(PromptExample(index, ids[-config.max_length :], row))
    return _done(
        path,
        examples,
        rows,
        limit.notes(" at the start: the policy does not see the beginning of these prompts, its system message first"),
    )


def sft_tokens(row: Row, template: Template) -> tuple[list[int], list[bool]]:
    fields = row.fields
    if "text" in fields:
        ids = template.text(fields["text"])
        return ids, [True] * len(ids)
    if "messages" in fields:
        messages: Messages = fields["messages"]
        segments = template.conversation(messages, row.where)
        return [i for s in segments for i in s.ids], [s.trained for s in segments for _ in s.ids]
    prompt, response = template.response(fields["prompt"], fields["completion"], row.where)
    return prompt + response, [False] * len(prompt) + [True] * len(response)


def split(length: int, limit: int) -> list[slice]:
    """A document's rows, of at most `limit` tokens each.

    A row begins with the last token of the one before: no row predicts its first token, and so each token but the document's
    first is predicted once.
    """
    return [slice(start, start + limit) for start in range(0, max(length - 1, 1), limit - 1)]


def _shorten(pair: PairExample, limit: int) -> PairExample:
    """Cuts the replies at their end so that the pair fits, never the prompt; a cut reply keeps no EOS it did not earn."""
    prompt, (chosen, rejected) = _cut(pair.prompt, [pair.chosen, pair.rejected], limit)
    return replace(pair, prompt=prompt, chosen=chosen, rejected=rejected)


def _cut(prompt: list[int], replies: list[list[int]], limit: int) -> tuple[list[int], list[list[int]]]:
    room = limit - len(prompt)
    return prompt[-(limit - 1) :] if room < 1 else prompt, [reply[: max(room, 1)] for reply in replies]


def _shortened(row: RatedExample, limit: int) -> RatedExample:
    prompt, (reply,) = _cut(row.prompt, [row.reply], limit)
    return replace(row, prompt=prompt, reply=reply)


def _read(
    path: str, kind: Kind, config: Reading, json_key: str | None = None, asked: Mapping[str, str] = MappingProxyType({})
) -> Rows:
    return read_rows(
        path,
        kind,
        columns=config.columns,
        json_key=json_key,
        extra_columns=config.extra_columns,
        asked=asked,
        on_error=config.on_error,
        max_skip_fraction=config.max_skip_fraction,
        max_line_bytes=config.max_line_bytes,
    )


def _done(path: str, examples: list[Example], rows: Rows, more_notes: list[str]) -> Examples[Example]:
    notes = rows.notes + more_notes
    if not examples:
        raise DataError(f"{path}: no usable row is left" + "".join(f"\n  {note}" for note in notes))
    return Examples(examples, notes, [row.asks for row in rows.rows])


class _LengthLimit:
    """Applies `too_long` and counts what it did."""

    def __init__(self, limit: int, rule: str, other_rules: str = "skip or truncate") -> None:
        self.limit, self.rule, self.other_rules = limit, rule, other_rules
        self.seen = self.hit = self.made = self.crowded = 0

    def allows(self, length: int, where: str, prompt: int = 0) -> bool:
        """`prompt`: tokens that come before what is learned from, and are not cut for it."""
        self.seen += 1
        if length <= self.limit:
            return True
        if self.rule == "fail":
            raise DataError(
                f"{where}: {length} tokens, more than data.max_length {self.limit}; "
                f"raise it, or set data.too_long to {self.other_rules}"
            )
        self.hit += 1
        self.crowded += prompt >= self.limit
        return self.rule != "skip"

    def parts(self, length: int) -> list[slice]:
        """What is used of a row that is allowed, one slice for each row it becomes."""
        if self.rule != "split":
            return [slice(self.limit)]
        parts = split(length, self.limit)
        if length > self.limit:
            self.made += len(parts)
        return parts

    def notes(self, where: str = "") -> list[str]:
        """`where`: the place at which a row is cut, if that needs saying: what stands there is then lost to the model."""
        if not self.hit:
            return []
        if self.rule == "split":
            return [f"{self.hit} documents longer than {self.limit} tokens split into {self.made} rows"]
        rows = f"{self.hit} of {self.seen} rows longer than {self.limit} tokens"
        many = self.hit > MANY * self.seen
        if self.rule == "skip":
            advice = "; --data.max_length N keeps more, --data.too_long truncate cuts them"
            return [f"warning: {rows} skipped{advice}" if many else f"{rows} skipped"]
        no_room = "the prompt leaves no room: it is cut at its start, and one token of each reply is kept"
        crowded = f"; of {self.crowded} of them {no_room}" if self.crowded else ""
        advice = "; --data.max_length N cuts less, --data.too_long skip leaves them out"
        return [f"warning: {rows} truncated{where}{crowded}{advice}" if many or where or crowded else f"{rows} truncated"]
