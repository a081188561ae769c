"""New files out of old ones: a split that stays what it is, and rows without their dirt. No file is written in place."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from rlhf.data.formats import Problem, Record, open_source
from rlhf.data.rows import MAX_LINE_BYTES, Row
from rlhf.data.shapes import SHAPES, BadRow, Kind, Schema
from rlhf.data.survey import CONTROL, HTML, key_of, unmangled, without_html
from rlhf.errors import DataError, StorageError


def split_file(
    path: Path, kind: Kind, columns: dict[str, str], json_key: str | None, outputs: Sequence[Path], part: float
) -> list[int]:
    """Writes rows as they are into (train, eval); about `part` of the prompts go to eval. How many rows each has, and how many
    are in neither, since chosen equals rejected.

    Raises DataError, and writes nothing, where a row is malformed or a side would be empty.
    """
    sides: list[list[Any]] = [[], []]
    equal = 0
    for record, row in _read(path, kind, columns, json_key):
        if isinstance(record, Problem):
            raise DataError(f"{record}\nrlhf data check shows all of its mistakes, rlhf data clean leaves such rows out")
        if row is None:
            equal += 1
            continue
        sides[int.from_bytes(row.asks[:8]) < part * 2**64].append(record.value)
    for side, output in zip(sides, outputs, strict=True):
        if not side:
            raise DataError(f"{path}: no row would go into {output}; it has too few prompts for such a part")
    for side, output in zip(sides, outputs, strict=True):
        _write(output, side)
    return [*map(len, sides), equal]


def clean_file(
    path: Path, kind: Kind, columns: dict[str, str], json_key: str | None, output: Path, keep_html: bool
) -> dict[str, Any]:
    """Writes `output` and, beside it, what became of each row that is not as it was. That report."""
    schema = Schema.of(kind, columns, json_key, "ignore")
    kept, changes, seen, read = [], defaultdict(list), set[str](), 0
    for record, row in _read(path, kind, columns, json_key):
        read += 1
        if isinstance(record, Problem):
            changes[f"left out: {record.reason}"].append(record.where)
            continue
        if row is None:
            changes["left out: chosen equals rejected"].append(record.where)
            continue
        value = {name: _mended(text, keep_html) if name in schema.names else text for name, text in record.value.items()}
        for what in _differences(record.value, value, keep_html):
            changes[what].append(record.where)
        try:
            mended = SHAPES[schema.kind](schema.fields_of(value))
        except BadRow as error:
            changes[f"left out, once mended: {error.reason}"].append(record.where)
            continue
        if mended is None:
            changes["left out: chosen equals rejected"].append(record.where)
            continue
        if (key := key_of(Row(record.where, mended, {}))) in seen:
            changes["left out: the same as a row before"].append(record.where)
            continue
        seen.add(key)
        kept.append(value)
    if not kept:
        raise DataError(f"{path}: no row is left")
    report = {"file": str(path), "output": str(output), "read": read, "written": len(kept), "changes": dict(changes)}
    _write(output, kept)
    _write(Path(f"{output}.report.json"), [report], indent=2)
    return report


def _read(
    path: Path, kind: Kind, columns: dict[str, str], json_key: str | None
) -> Iterator[tuple[Problem, None] | tuple[Record, Row | None]]:
    """Each record beside its row; none where it is of no use though nothing is wrong."""
    schema = Schema.of(kind, columns, json_key, "ignore")
    for record in open_source(path, [], MAX_LINE_BYTES, prompts=kind == "prompt"):
        if isinstance(record, Problem):
            yield record, None
            continue
        try:
            fields = SHAPES[schema.kind](schema.fields_of(record.value))
        except BadRow as error:
            yield Problem(record.where, error.reason, error.fix), None
        else:
            yield record, None if fields is None else Row(record.where, fields, {})


MENDS: tuple[Callable[[str], str], ...] = (unmangled, without_html, lambda text: CONTROL.sub("", text))


def _mended(value: Any, keep_html: bool) -> Any:
    if isinstance(value, str):
        for mend in MENDS:
            if not (keep_html and mend is without_html):
                value = mend(value)
        return value
    if isinstance(value, list):
        return [_mended(item, keep_html) for item in value]
    if isinstance(value, dict):
        return {name: _mended(item, keep_html) for name, item in value.items()}
    return value


def _differences(before: Any, after: Any, keep_html: bool) -> list[str]:
    if before == after:
        return []
    text = json.dumps(before, ensure_ascii=False)
    found = ["encoding mended"] if unmangled(text) != text else []
    found += ["HTML taken out"] if HTML.search(text) and not keep_html else []
    return found or ["control characters taken out"]


def _plain(value: Any) -> Any:
    """What a parquet column may hold and JSON has no form for."""
    if isinstance(value, date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return float(value)
    raise DataError(f"a column holds {type(value).__name__}, which JSON has no form for: leave the column out")


def _write(file: Path, lines: Sequence[Any], indent: int | None = None) -> None:
    """The file appears complete or not at all."""
    partial = file.with_name(f".{file.name}-{os.getpid()}")
    try:
        partial.write_text(
            "".join(json.dumps(line, ensure_ascii=False, indent=indent, default=_plain) + "\n" for line in lines),
            encoding="utf-8",
        )
        partial.replace(file)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise StorageError(f"{file}: cannot be written: {error.strerror}") from error
