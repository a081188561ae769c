"""The strict reader of training data: a file becomes rows of one known shape, or one error that lists all its mistakes.

Nothing is coerced: a wrong type, a missing key or a null is an error with its place, never a silent None. What the
reader does change (an alias, an hh-rlhf transcript, a dropped pair) is counted in the notes. The kinds, after reading:

    text     {"text": str}
    sft      {"messages": [...]} or {"prompt", "completion"} or {"text": str}
    pair     {"prompt", "chosen", "rejected"}
    ranking  {"prompt", "responses": [...], "ranks": [float], "margin": float}; two responses of a pair, or more
    rated    {"prompt", "completion", "label": bool}, or as pair
    prompt   {"prompt"}
    reply    as sft, but the completion may be empty: it is scored, and not learned from
    replies  as pair, but either may be empty, and both the same

Each of prompt, completion, chosen, rejected and responses is a string or a list of {"role", "content"} messages, and all of
one row have the same form:
- an hh-rlhf transcript becomes messages: the prompt is all before the open "Assistant:", " text" after it one message;
- a reply given as a string beside a prompt of messages becomes one assistant message;
- Alpaca's instruction and input become the prompt, its output the completion;
- ShareGPT turns ({"from", "value"}) become messages; so does one bare turn given as a reply;
- pairs that are whole conversations (messages or transcripts) are split where they part, as TRL's implicit prompt.
A row of kind prompt may hold a whole conversation (messages, or chosen): all before its last reply is the prompt.

Left out: chat templates, tokens and lengths (templates.py, examples.py), the order of rows (order.py).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rlhf.data.conversations import BadRow
from rlhf.data.formats import Problem, Record, open_source
from rlhf.data.shapes import SHAPES, ExtraColumns, Kind, Schema
from rlhf.errors import DataError

MAX_LINE_BYTES = 8 * 2**20
PROBLEMS_SHOWN = 20
REASONS_SHOWN = 5
ALIKE_SHOWN = 5
"""More mistakes than these that are the same, a misnamed column say, are told once."""


@dataclass(frozen=True)
class Row:
    """One usable row: its place in the file, its normalised fields, and the columns that are none of these."""

    where: str
    fields: dict[str, Any]
    others: dict[str, Any]

    @cached_property
    def asks(self) -> bytes:
        """Digest of what stands before the last reply, of plain text of all: equal for one prompt, however it is written."""
        if "text" in self.fields:
            asked = self.fields["text"]
        elif "messages" in self.fields:
            messages = self.fields["messages"]
            asked = messages[: max(turn for turn, message in enumerate(messages) if message["role"] == "assistant")]
        else:
            prompt = self.fields["prompt"]
            asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return blake2b(json.dumps(asked).encode(), digest_size=16).digest()


@dataclass(frozen=True)
class Rows:
    """The usable rows of a file in order; notes on what was changed or dropped."""

    rows: list[Row]
    notes: list[str]


@dataclass
class Scan:
    """What a file holds: usable rows, what is wrong with the others, pairs without a difference, remarks."""

    rows: list[Row]
    problems: list[Problem]
    notes: list[str]
    dropped: int
    columns: dict[str, None] = field(default_factory=dict)
    """The file's columns that were read, in its order."""
    unread: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Place of a row -> its columns that are no field and that nobody asked for."""


def read_rows(
    path: str | Path,
    kind: Kind,
    *,
    columns: Mapping[str, str] | None = None,
    json_key: str | None = None,
    extra_columns: ExtraColumns = "fail",
    asked: Mapping[str, str] = MappingProxyType({}),
    on_error: Literal["fail", "skip"] = "fail",
    max_skip_fraction: float = 0.01,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Rows:
    """Reads a .jsonl, .jsonl.gz, .json or .parquet file; prompts also from a .txt file, one a line.

    `columns` maps our name of a field to the file's ("prompt": "question"); `json_key` names the column of plain text,
    for kinds text and sft. `asked` maps columns that every row must have, beside those of its kind, to who asks for them:
    they are among its `others`. With `on_error="skip"` bad rows are dropped and counted, up to `max_skip_fraction` of all
    rows. `max_line_bytes` bounds a line of jsonl.

    Raises DataError, one line a mistake as `file:line:column: reason; fix`, and ConfigError where `columns` or
    `json_key` do not fit the kind.
    """
    found = scan_rows(
        path, kind, columns=columns, json_key=json_key, extra_columns=extra_columns, asked=asked, max_line_bytes=max_line_bytes
    )
    path, rows, problems, notes, dropped = Path(path), found.rows, found.problems, found.notes, found.dropped
    total = len(rows) + dropped + len(problems)
    _check_problems(path, problems, total, 0.0 if on_error == "fail" else max_skip_fraction)
    if not rows:
        raise DataError(f"{path}: no usable row; in all {dropped} pairs chosen equals rejected")
    if problems:
        notes.append(f"Bad rows were skipped: {_reasons(problems)}.")
    if repeats := len(rows) - len({row.asks for row in rows}):
        notes.append(f"A {'text' if 'text' in rows[0].fields else 'prompt'} seen before is repeated in {_count(repeats)}.")
    return Rows(rows, notes)


def scan_rows(
    path: str | Path,
    kind: Kind,
    *,
    columns: Mapping[str, str] | None = None,
    json_key: str | None = None,
    extra_columns: ExtraColumns = "fail",
    asked: Mapping[str, str] = MappingProxyType({}),
    max_line_bytes: int = MAX_LINE_BYTES,
) -> Scan:
    """All that is right and wrong with a file, without an opinion on how much of it may be; arguments as of `read_rows`.

    Raises DataError where there is no such file, ConfigError where `columns` or `json_key` do not fit the kind.
    """
    schema = Schema.of(kind, columns or {}, json_key, extra_columns, asked)
    found, remarks = Scan([], [], [], 0), Counter[str]()
    for record in open_source(Path(path), found.notes, max_line_bytes, prompts=kind == "prompt"):
        if isinstance(record, Problem):
            found.problems.append(record)
            continue
        try:
            known = schema.fields_of(record.value)
            fields = SHAPES[schema.kind](known)
        except BadRow as error:
            found.problems.append(Problem(record.where, error.reason, error.fix))
            continue
        remarks.update(known.remarks)
        found.columns.update(dict.fromkeys(column for column in known.given if column not in known.unread))
        if known.unread:
            found.unread[record.where] = known.unread
        if fields is None:
            found.dropped += 1
        else:
            found.rows.append(Row(record.where, fields, schema.others_of(record.value)))
    found.notes.extend(f"{remark} in {_count(number)}." for remark, number in sorted(remarks.items()))
    return found


def first_columns(path: str, max_line_bytes: int) -> list[str]:
    """The columns of a file's first row, so that one who asks for another can be told before models are opened; none where
    that row cannot be read, as the reader of all rows will say."""
    first = next(open_source(Path(path), [], max_line_bytes, prompts=True), None)
    return list(first.value) if isinstance(first, Record) and isinstance(first.value, dict) else []


def _check_problems(path: Path, problems: list[Problem], total: int, allowed_fraction: float) -> None:
    """Raises DataError where the file cannot be used at all, or more of its rows are bad than may be skipped."""
    if total == 0:
        raise DataError(f"{path}: the file is empty; expected at least one row")
    if any(problem.fatal for problem in problems):
        raise DataError(_report(problems))
    if len(problems) > allowed_fraction * total:
        lines = [_report(problems)]
        if allowed_fraction:
            limit = f"data.max_skip_fraction is {allowed_fraction:g}"
            lines.append(f"{path}: {len(problems)} of {total} rows are bad; {limit}")
        raise DataError("\n".join(lines))


def _report(problems: list[Problem]) -> str:
    shown = problems_alike(problems)
    lines = [line for line, _ in shown[:PROBLEMS_SHOWN]]
    if rest := [problem for _, alike in shown[PROBLEMS_SHOWN:] for problem in alike]:
        lines.append(f"and {len(rest)} more: {_reasons(rest)}")
    return "\n".join(lines)


def problems_alike(problems: list[Problem]) -> list[tuple[str, list[Problem]]]:
    """(what to say, of which mistakes) in their order, those that are the same many times at the place of their first."""
    same: dict[tuple[str, str], list[Problem]] = {}
    for problem in problems:
        same.setdefault((problem.reason, problem.fix), []).append(problem)
    found = []
    for problem in problems:
        alike = same[problem.reason, problem.fix]
        if len(alike) <= ALIKE_SHOWN:
            found.append((str(problem), [problem]))
        elif problem is alike[0]:
            others = ", ".join(other.where for other in alike[1:ALIKE_SHOWN])
            found.append((f"{problem}\nand in {_count(len(alike) - 1)} more the same: {others}, ...", alike))
    return found


def _reasons(problems: list[Problem]) -> str:
    """The commonest reasons with the number of rows of each."""
    reasons = Counter(problem.reason for problem in problems)
    listed = [f"{reason} in {_count(number)}" for reason, number in reasons.most_common(REASONS_SHOWN)]
    if others := len(reasons) - len(listed):
        listed.append(f"{others} other reasons")
    return "; ".join(listed)


def _count(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"
