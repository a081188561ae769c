"""Rows as a model gets them, for a person to look at: which tokens, which of them are trained on, where a reply ends."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.text import Text

from rlhf.data.examples import sft_tokens
from rlhf.data.rows import Row, read_rows
from rlhf.data.shapes import Kind
from rlhf.data.survey import preference_of
from rlhf.data.templates import Template

TRAINED, READ, END, WRONG = "green", "dim", "bold black on green", "bold white on red"
SIGNS = "⟦", "⟧"
ROLES: dict[Kind, str] = {"ranking": "of the reply"}
"""What a stage makes of the tokens in colour, where it is not to train on them: a reward model scores them."""


@dataclass(frozen=True)
class Preview:
    text: Text
    two_bos: bool


def preview(
    path: Path,
    kind: Kind,
    columns: dict[str, str],
    json_key: str | None,
    template: Template,
    count: int,
    max_length: int,
    marked: bool = False,
) -> Iterator[Preview]:
    """The first `count` rows; where `marked`, what is trained on stands between signs. Raises DataError as the stages would."""
    rows = read_rows(
        path, kind, columns=columns, json_key=json_key, extra_columns="ignore", on_error="skip", max_skip_fraction=1.0
    ).rows
    for row in islice(rows, count):
        for name, ids, trained in _sides(row, template):
            of_them = f", {sum(trained)} {ROLES.get(kind, 'of them trained on')}" if kind != "prompt" else ""
            title = f"{row.where}  {name}: {len(ids)} tokens{of_them}\n"
            cut = slice(max(len(ids) - max_length, 0)) if kind == "prompt" else slice(max_length, None)
            yield _drawn(title, ids, trained, template, set(range(len(ids))[cut]), SIGNS if marked else ("", ""))


def _sides(row: Row, template: Template) -> Iterator[tuple[str, list[int], list[bool]]]:
    """(name, ids, whether each token is trained on, or of a reward model read) of what one row becomes."""
    fields = row.fields
    if "chosen" in fields:
        replies = {"chosen": fields["chosen"], "rejected": fields["rejected"]}
    elif pair := preference_of(row):
        replies = dict(zip(("chosen", "rejected"), pair, strict=True))
    elif "responses" in fields:
        replies = {f"rank {rank:g}": reply for rank, reply in zip(fields["ranks"], fields["responses"], strict=True)}
    elif fields.keys() == {"prompt"}:
        ids = template.prompt(fields["prompt"], row.where)
        yield "prompt", ids, [False] * len(ids)
        return
    elif "label" in fields:
        replies = {"desirable" if fields["label"] else "undesirable": fields["completion"]}
    else:
        yield "row", *sft_tokens(row, template)
        return
    for name, reply in replies.items():
        prompt, response = template.response(fields["prompt"], reply, row.where)
        yield name, prompt + response, [False] * len(prompt) + [True] * len(response)


def _drawn(
    title: str, ids: list[int], trained: list[bool], template: Template, cut: set[int], signs: tuple[str, str]
) -> Preview:
    tokenizer = template.tokenizer
    two_bos = len(ids) > 1 and ids[0] == ids[1] == tokenizer.bos_token_id
    text = Text(title, style="bold")
    if two_bos:
        text.append(f"error: two BOS ({tokenizer.bos_token!r}): the text brings the one that the tokenizer adds\n", style=WRONG)
    if cut:
        text.append(f"longer than --max-length {len(ids) - len(cut)}: what is cut is underlined\n", style="yellow")
    for place, (token, learned) in enumerate(zip(ids, trained, strict=True)):
        ends = learned and token in template.stop_ids
        style = WRONG if two_bos and place < 2 else END if ends else TRAINED if learned else READ
        if learned and not (place and trained[place - 1]):
            text.append(signs[0])
        shown = str(tokenizer.decode([token])).replace("\n", "⏎\n")
        text.append(f"{shown}", style=style + (" underline" if place in cut else ""))
        if ends or token in tokenizer.all_special_ids:
            text.append(f"({token})", style="cyan")
        if learned and not any(trained[place + 1 : place + 2]):
            text.append(signs[1])
    if any(trained) and not any(token in template.stop_ids for token, learned in zip(ids, trained, strict=True) if learned):
        text.append("\nno end of a reply is trained: a model would not learn to stop", style="yellow")
    return Preview(text, two_bos)
