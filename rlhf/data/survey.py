"""What is odd about data that can be read: the findings of `rlhf data check`, each with its count and the first places.

Nothing here is an error: a row may hold HTML on purpose, and a prompt may be asked twice. Errors are the reader's (rows.py).
"""

from __future__ import annotations

import html
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from math import ceil
from pathlib import Path
from typing import Any

from rlhf.data.formats import Record, open_source
from rlhf.data.rows import MAX_LINE_BYTES, Row, first_columns, read_rows, scan_rows
from rlhf.data.shapes import SHAPES, BadRow, Dialogue, Kind, Schema
from rlhf.errors import DataError

PLACES_SHOWN = 3
LENGTH_BIAS = 0.55
"""Share of pairs whose better reply is the longer one above which it is said: hh-rlhf has 0.59."""
PARTS = {"shortest": 0, "median": 50, "90%": 90, "99%": 99, "longest": 100}
TAGS = "a|b|br|code|div|em|font|h[1-6]|i|img|li|ol|p|pre|script|span|strong|style|table|td|th|tr|u|ul"
HTML = re.compile(rf"</?(?:{TAGS})(?:\s[^<>]*)?/?>|&(?:amp|lt|gt|quot|apos|nbsp|#\d+|#x[0-9a-f]+);", re.IGNORECASE)
CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x9f]")
UNDEFINED = "\x81\x8d\x8f\x90\x9d"
"""The bytes that Windows-1252 has no letter for; readers leave them as they are."""
CONTINUED = "[" + re.escape(bytes(range(0x80, 0xC0)).decode("cp1252", errors="ignore")) + UNDEFINED + "]"
MOJIBAKE = re.compile(f"[ÂÃ]{CONTINUED}|â€{CONTINUED}|ðŸ{CONTINUED}{{2}}")
"""UTF-8 that was read as Windows-1252, as far as it cannot well be anything else: accents, quotes, dashes, emoji. Other
lead bytes are letters that do stand before a quote or a dot (Spaß“, CAFÉ…)."""

ORDER: tuple[Kind, ...] = ("ranking", "rated", "sft", "prompt")
"""Kinds a file is tried as, the one that asks for most first."""
GUESSED_FROM = 100
"""Rows that a guess of the kind looks at."""


@dataclass(frozen=True)
class Finding:
    name: str
    count: int
    of: int
    text: str
    places: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.places[:PLACES_SHOWN])
        more = f" and {self.count - PLACES_SHOWN} more" if self.count > PLACES_SHOWN else ""
        return f"{self.count} of {self.of} rows {self.text}" + (f": {shown}{more}" if shown else "")


def require_columns(path: Path, columns: dict[str, str]) -> None:
    """Raises DataError where no row has a column that is mapped: the rows would be read as another kind than was meant."""
    missing, there = set(columns.values()), dict[str, None]()
    for record in open_source(path, [], MAX_LINE_BYTES, prompts=True):
        if not missing:
            return
        if isinstance(record, Record) and isinstance(record.value, dict):
            there.update(dict.fromkeys(record.value))
            missing -= there.keys()
    if there and missing:
        listed = " or ".join(repr(column) for column in columns.values() if column in missing)
        raise DataError(f"{path}: no row has a column {listed}; there are {', '.join(there)}")


def guess_kind(path: Path, columns: dict[str, str]) -> Kind | None:
    """The first kind as which half of the first rows or more can be read, columns nobody knows aside."""
    source = open_source(path, [], MAX_LINE_BYTES, prompts=True)
    records = (record.value for record in source if isinstance(record, Record))
    values = list(islice(records, GUESSED_FROM))
    if not values:
        return None
    return next((kind for kind in ORDER if 2 * sum(_fits(kind, value, columns) for value in values) >= len(values)), None)


def _fits(kind: Kind, value: Any, columns: dict[str, str]) -> bool:
    known = {name: column for name, column in columns.items() if name in Schema.of(kind, {}, None, "ignore").columns}
    try:
        fields = Schema.of(kind, known, None, "ignore").fields_of(value)
        # pairs with a mistake in them are pairs, though their prompt alone could be read
        if kind != "ranking" or "chosen" not in fields or "rejected" not in fields:
            SHAPES[kind](fields)
    except BadRow:
        return False
    return True


def texts(value: Any) -> Iterator[str]:
    """Every string in it, roles aside."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    elif isinstance(value, dict):
        for name, item in value.items():
            if name not in ("role", "from"):
                yield from texts(item)


def is_mojibake(text: str) -> bool:
    """Whether it reads as UTF-8 once Windows-1252 is undone: what happens to hold the same letters does not."""
    return unmangled(text) != text


def unmangled(text: str) -> str:
    """Each letter that is UTF-8 read as Windows-1252, as what it was; all else as it is."""

    def letter(match: re.Match[str]) -> str:
        try:
            return b"".join(one.encode("latin-1" if one in UNDEFINED else "cp1252") for one in match[0]).decode()
        except UnicodeError:  # an overlong form, a surrogate
            return match[0]

    return MOJIBAKE.sub(letter, text)


def without_html(text: str) -> str:
    """Tags taken out (a line break for `<br>` and `</p>`), entities read; what resembles them (`&copy=2`) stays."""

    def once(found: re.Match[str]) -> str:
        if found[0].startswith("&"):
            return html.unescape(found[0])
        return "\n" if re.match(r"<br|</p", found[0], re.IGNORECASE) else ""

    return HTML.sub(once, text)


FLAWS: dict[str, tuple[Callable[[str], bool], str]] = {
    "html": (lambda text: HTML.search(text) is not None, "hold remnants of HTML"),
    "encoding": (lambda text: "\ufffd" in text or is_mojibake(text), "hold letters of a broken encoding (Ã©, �)"),
    "control": (lambda text: CONTROL.search(text) is not None, "hold control characters"),
}


def survey(rows: Sequence[Row]) -> list[Finding]:
    """All findings on the rows of one file that are not nothing."""
    found = [
        Finding(name, len(places), len(rows), text, tuple(places))
        for name, (has, text) in FLAWS.items()
        if (places := [row.where for row in rows if any(map(has, texts(row.fields)))])
    ]
    return found + [finding for finding in (_duplicates(rows), _contradictions(rows), _length_bias(rows)) if finding]


def _finding(name: str, places: Iterable[str], of: int, text: str) -> Finding | None:
    places = tuple(places)
    return Finding(name, len(places), of, text, places) if places else None


def key_of(row: Row) -> str:
    return json.dumps(row.fields, sort_keys=True, ensure_ascii=False)


def _duplicates(rows: Sequence[Row]) -> Finding | None:
    seen: set[str] = set()
    places = [row.where for row in rows if (key := key_of(row)) in seen or seen.add(key)]
    return _finding("duplicates", places, len(rows), "say what a row before them says")


def _contradictions(rows: Sequence[Row]) -> Finding | None:
    """Rows that prefer what another row of the same prompt rejects."""
    prefers: dict[bytes, set[tuple[str, ...]]] = defaultdict(set)
    places = []
    for row in rows:
        if preference := tuple(json.dumps(reply, sort_keys=True) for reply in preference_of(row)):
            if preference[::-1] in prefers[row.asks]:
                places.append(row.where)
            prefers[row.asks].add(preference)
    return _finding("contradictions", places, len(rows), "prefer what a row before them rejects")


def preference_of(row: Row) -> tuple[Dialogue, ...]:
    """(better reply, worse reply) of a pair; nothing of a tie, and of more than two."""
    fields = row.fields
    if "chosen" in fields:
        return fields["chosen"], fields["rejected"]
    if len(fields.get("responses", ())) != 2 or fields["ranks"][0] == fields["ranks"][1]:
        return ()
    one, other = fields["responses"]
    return (one, other) if fields["ranks"][0] < fields["ranks"][1] else (other, one)


def _length_bias(rows: Sequence[Row]) -> Finding | None:
    sizes = [tuple(characters(reply) for reply in pair) for row in rows if (pair := preference_of(row))]
    longer = sum(better > worse for better, worse in sizes)
    if not sizes or longer / len(sizes) <= LENGTH_BIAS:
        return None
    return Finding("length", longer, len(sizes), "prefer the longer reply, so that a reward model may learn length alone", ())


def characters(value: Any) -> int:
    return sum(map(len, texts(value)))


def lengths(rows: Sequence[Row]) -> dict[str, list[int]]:
    """Characters of each field over all rows; of two replies, of the better and the worse one."""
    found: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        for name, value in row.fields.items():
            if name == "responses" and (pair := preference_of(row)):
                for side, reply in zip(("chosen", "rejected"), pair, strict=True):
                    found[side].append(characters(reply))
            elif name not in ("ranks", "margin", "label"):
                found[name].append(characters(value))
    return dict(found)


def percentiles(values: Sequence[int]) -> list[int]:
    """At each of PARTS, the smallest value that so many per cent of all are not above (the nearest rank)."""
    ordered = sorted(values)
    return [ordered[max(0, ceil(per_cent * len(ordered) / 100) - 1)] for per_cent in PARTS.values()]


def check(
    path: Path, kind: Kind, columns: dict[str, str], json_key: str | None = None, against: Path | None = None
) -> dict[str, Any]:
    """All there is to say of a file without a tokenizer.

    Raises DataError where it, or `against`, cannot be read at all; ConfigError where a column is none of the kind.
    """
    options: dict[str, Any] = {"json_key": json_key, "extra_columns": "ignore"}
    found = scan_rows(path, kind, columns=columns, **options)
    findings = survey(found.rows)
    if found.dropped:
        findings.append(Finding("equal", found.dropped, found.dropped + len(found.rows), "choose what they reject", ()))
    if unread := list(dict.fromkeys(column for columns in found.unread.values() for column in columns)):
        advice = "a stage refuses them, unless its reward asks for them or --data.extra_columns ignore is given"
        text = f"have columns that are no field ({', '.join(map(repr, unread))}): {advice}"
        readable = len(found.rows) + found.dropped
        places = tuple(found.unread) if len(found.unread) < readable else ()
        findings.append(Finding("columns", len(found.unread), readable, text, places))
    apart = ""
    if against is not None:
        there = first_columns(str(against), MAX_LINE_BYTES)
        own = {name: column for name, column in columns.items() if column in there}
        other = read_rows(against, guess_kind(against, own) or kind, columns=own, **options, on_error="skip")
        asked = {row.asks for row in other.rows}
        places = [row.where for row in found.rows if row.asks in asked]
        if leaked := _finding("leakage", places, len(found.rows), f"ask what a row of {against} asks"):
            findings.append(leaked)
        elif found.rows:
            apart = f"none of {len({row.asks for row in found.rows})} prompts is in {against}"
    return {
        "file": str(path),
        "kind": kind,
        "rows": len(found.rows) + found.dropped + len(found.problems),
        "columns": list(found.columns),
        "notes": found.notes,
        "errors": [asdict(problem) for problem in found.problems],
        "against": apart,
        "findings": [{"name": one.name, "rows": one.count, "text": str(one)} for one in findings],
        "characters": {name: dict(zip(PARTS, percentiles(sizes), strict=True)) for name, sizes in lengths(found.rows).items()},
    }
