"""`rlhf score`: what a reward gives the replies of a file, a row for each."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rlhf.config.commands import ScoreConfig
from rlhf.config.parse import Invocation
from rlhf.data.examples import MANY, PromptExample
from rlhf.data.formats import Record, open_source
from rlhf.data.order import chunks
from rlhf.data.rows import Row, first_columns, read_rows
from rlhf.data.templates import Messages
from rlhf.errors import DataError
from rlhf.functional.preference import accuracy, wilson_interval
from rlhf.models.roles import RewardModel, open_text_reward
from rlhf.report.console import Console
from rlhf.rollout.readers import AT_ONCE, columns_asked, open_readers_of, require_answers
from rlhf.rollout.rewards import CombinedReward, Replies, open_reward, read_again, require_finite_scores
from rlhf.runs.gate import reward_gate
from rlhf.training.evaluation.replies import counted_scores
from rlhf.training.output_file import require_free, require_new, write

SIDES = ("chosen", "rejected")
Dialogue = str | Messages
Values = dict[str, Any]


class Scored(NamedTuple):
    """A reply of a row; `side` is one of SIDES, or empty where the row has one reply."""

    side: str
    asked: PromptExample
    text: str
    finished: bool

    @property
    def column(self) -> str:
        return f"score_{self.side}" if self.side else "score"

    @property
    def columns(self) -> tuple[str, str]:
        """That of its score, and that of the scores of several sources."""
        return self.column, self.column.replace("score", "scores")


def score(invocation: Invocation[ScoreConfig]) -> int:
    config, console, output = invocation.config, Console("score", speak=True), require_new(invocation.config.output)
    for note in reward_gate(config.reward):
        console.note(note)
    data = config.data
    readers = open_readers_of(config.reward, [data.file], data.max_line_bytes)
    rows = _read(config, columns_asked(config.reward, readers.values()), console)
    records = open_source(Path(data.file), [], data.max_line_bytes)
    given: dict[str, Values] = {record.where: record.value for record in records if isinstance(record, Record)}
    ended = _says_whether_it_ended(data.columns.get("completion", ""))
    replies = [reply for index, row in enumerate(rows) for reply in replies_of(row, index, given[row.where], ended)]
    for reply in replies:
        require_free(reply.asked.row, given[reply.asked.row.where], reply.columns[: 2 if config.reward.sources else 1])
    require_answers(readers.values(), [reply.asked for reply in replies])
    trusted = config.trust_remote_code
    models = {name: open_text_reward(spec, data.template, trusted) for name, spec in config.reward.models.items()}
    read = _fitting(replies, models, config, console)
    count = counted_scores(config.reward, models, len(read), console)
    reward = open_reward(config.reward, readers, models, None, config.batch_size, told=count.add)
    nothing = dict.fromkeys(config.reward.sources)
    found: list[tuple[float | None, Mapping[str, float | None]]] = [(None, nothing)] * len(replies)
    with closing(console):
        for part in chunks(read, AT_ONCE):  # a call of a function or a service has a deadline
            for place, scores in zip(part, _scores(reward, config.reward.weight, [replies[at] for at in part]), strict=True):
                found[place] = scores
    lines = [dict(given[row.where]) for row in rows]
    for reply, scores in zip(replies, found, strict=True):
        lines[reply.asked.index] |= dict(zip(reply.columns, scores if config.reward.sources else scores[:1], strict=False))
    write(output, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    result = {"output": str(output), "rows": len(lines), **summary(replies, [total for total, _ in found])}
    print(json.dumps(result, indent=2) if invocation.as_json else described(result))
    return 0


def replies_of(row: Row, index: int, given: Values, ended: str) -> list[Scored]:
    """What is scored of a row: all but the last message of the assistant is its prompt.

    Args:
        given: the row as it came.
        ended: the column that says whether the reply ended by itself, where there is one.

    Raises:
        DataError: the row is a text, its chat does not end with a reply, or whether that ended is not true or false.
    """
    fields = row.fields
    if "text" in fields:
        raise DataError(f"{row.where}: is a text; expected messages, a prompt with its completion, or with chosen and rejected")
    if "messages" in fields:
        *before, last = fields["messages"]
        if last["role"] != "assistant" or not before:
            raise DataError(f"{row.where}: messages must ask something and end with the assistant's reply, which is scored")
        named: dict[str, tuple[Dialogue, Dialogue]] = {"": (before, last["content"])}
    elif "chosen" in fields:
        named = {side: (fields["prompt"], fields[side]) for side in SIDES}
    else:
        named = {"": (fields["prompt"], fields["completion"])}
    finished = given.get(ended, True)
    if not isinstance(finished, bool):
        said = json.dumps(finished, default=str)
        raise DataError(f"{row.where}: {ended} is {said:.60}, expected true or false: whether the reply ended by itself")
    found = []
    for side, (prompt, reply) in named.items():
        if not isinstance(reply, str):
            assert not isinstance(prompt, str)
            prompt, reply = [*prompt, *reply[:-1]], reply[-1]["content"]
        found.append(Scored(side, PromptExample(index, [], Row(row.where, {"prompt": prompt}, row.others)), reply, finished))
    return found


def summary(replies: Sequence[Scored], scores: Sequence[float | None]) -> dict[str, Any]:
    """Moments of the scores there are; of pairs, how often the chosen reply has the higher one, with Wilson's 95% interval.

    Two replies that are the same are no pair.
    """
    known = [score for score in scores if score is not None]
    found: dict[str, Any] = {"replies": len(scores), "scored": len(known)}
    if known:
        of = torch.tensor(known, dtype=torch.float64)
        found |= {"mean": float(of.mean()), "deviation": float(of.std(correction=0))}
        found |= {"least": float(of.min()), "most": float(of.max())}
    sides = ([both for both in zip(replies, scores, strict=True) if both[0].side == side] for side in SIDES)
    pairs = [
        (better, worse)
        for (chosen, better), (rejected, worse) in zip(*sides, strict=True)
        if None not in (better, worse) and (chosen.asked, chosen.text) != (rejected.asked, rejected.text)
    ]
    if pairs:
        right = float(accuracy(*torch.tensor(pairs, dtype=torch.float64).T).sum())
        low, high = wilson_interval(right, len(pairs))
        found |= {"pairs": len(pairs), "accuracy": right / len(pairs), "accuracy_low": low, "accuracy_high": high}
    return found


def described(result: dict[str, Any]) -> str:
    left = f", {missing} without a score" if (missing := result["replies"] - result["scored"]) else ""
    text = f"score  {result['replies']} replies of {result['rows']} rows: {result['output']}{left}"
    if "mean" in result:
        text += "\nmean {mean:.4f}, deviation {deviation:.4f}, {least:.4f} to {most:.4f}".format(**result)
    if "pairs" in result:
        interval = "95%: {accuracy_low:.3f} to {accuracy_high:.3f}, {pairs} pairs".format(**result)
        text += f"\nthe chosen reply scores higher in {result['accuracy']:.3f} ({interval})"
    return text


def _read(config: ScoreConfig, asked: dict[str, str], console: Console) -> list[Row]:
    data = config.data
    is_pair = data.columns.get("chosen", "chosen") in first_columns(data.file, data.max_line_bytes)
    found = read_rows(
        data.file,
        "replies" if is_pair else "reply",
        columns=data.columns,
        extra_columns=data.extra_columns,
        asked=asked,
        on_error=data.on_error,
        max_skip_fraction=data.max_skip_fraction,
        max_line_bytes=data.max_line_bytes,
    )
    for note in found.notes:
        console.note(note)
    return found.rows


def _says_whether_it_ended(completion: str) -> str:
    """The column that does, beside that of the reply, as `rlhf generate` writes both: `response_fp32`, `finished_fp32`."""
    return "finished" + completion.removeprefix("response") if completion.startswith("response") else "finished"


def _fitting(replies: Sequence[Scored], models: Mapping[str, RewardModel], config: ScoreConfig, console: Console) -> list[int]:
    """Places of the replies that every reward model has room for, told before any of them is scored.

    Raises:
        DataError: one is too long, and `too_long` is `fail`.
    """
    data, long = config.data, set[int]()
    for name, model in models.items():
        assert model.template is not None
        limit = min((most for most in (data.max_length, model.positions) if most), default=math.inf)
        whose = "data.max_length" if limit == data.max_length else "the positions it has"
        for place, reply in enumerate(replies):
            row = read_again(model.template, reply.asked, reply.text, reply.finished)
            length = len(row.prompt) + len(row.reply)
            if length > limit and data.too_long == "fail":
                raise DataError(
                    f"{reply.asked.row.where}: {length} tokens of the reward model {config.reward.models[name]}, more than "
                    f"{limit}, {whose}; shorten the row, or set data.too_long to skip: it then gets no score"
                )
            if length > limit:
                long.add(place)
    if long:
        many = "warning: " if len(long) > MANY * len(replies) else ""
        console.note(f"{many}{len(long)} of {len(replies)} replies are too long, and get no score")
    return [place for place in range(len(replies)) if place not in long]


def _scores(
    reward: CombinedReward, weight: float, part: Sequence[Scored]
) -> list[tuple[float | None, dict[str, float | None]]]:
    """Of each reply the score, None where it has none, and those of the sources where there are several."""
    none: list[list[int]] = [[] for _ in part]
    asked, texts, finished = [reply.asked for reply in part], [reply.text for reply in part], [reply.finished for reply in part]
    scores = reward.of(Replies(asked, none, texts, finished, none))
    scores = replace(scores, scores=weight * scores.scores.double())
    require_finite_scores(scores, asked)
    found = []
    for at in range(len(part)):
        values = {name: float(column[at]) for name, column in scores.components.items()}
        known = {name: None if math.isnan(value) else value for name, value in values.items()}
        found.append((float(scores.scores[at]) if scores.kept[at] else None, known))
    return found
