"""The file formats of training data, read record by record: jsonl (also .jsonl.gz), a json array, parquet; prompts also text.

A source yields every record with its place, and a `Problem` where there is none to give, so that one pass finds all
mistakes of a file. It is stricter than Python's json: duplicate keys, NaN, Infinity and invalid UTF-8 are refused, and
a line is never read past its limit.
Left out: what a record must hold (rows.py), remote files, and streaming of json arrays, which are read whole.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf.errors import DataError

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BOM_NOTE = "The file starts with a byte-order mark, which was skipped."


@dataclass(frozen=True)
class Record:
    """One value of the file, not looked into yet; `where` is its place as people and editors write it."""

    where: str
    value: Any


@dataclass(frozen=True)
class Problem:
    """Why there is no usable record at `where`; after a `fatal` one the rest of the file cannot be read."""

    where: str
    reason: str
    fix: str = ""
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}" + (f"; {self.fix}" if self.fix else "")


Source = Iterator[Record | Problem]


class StrictDecoder(json.JSONDecoder):
    """JSON as RFC 8259 has it; what Python lets pass is listed in `complaints`, so that decoding can go on."""

    def __init__(self) -> None:
        self.complaints: list[str] = []
        super().__init__(object_pairs_hook=self._object, parse_constant=self._constant)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(key, _)] = Counter(key for key, _ in pairs).most_common(1)
            self.complaints.append(f"duplicate key {key!r}")
        return values

    def _constant(self, name: str) -> None:
        self.complaints.append(f"{name} is not a JSON value")

    def take_complaints(self) -> str:
        """The complaints since the last call as one phrase, empty when there were none."""
        phrase, self.complaints = ", ".join(dict.fromkeys(self.complaints)), []
        return phrase


def read_jsonl(path: Path, notes: list[str], max_line_bytes: int) -> Source:
    """One JSON object a line; places are `file:line`, and `file:line:column` where the text itself is broken."""
    decoder = StrictDecoder()
    blank = number = 0
    with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
        try:
            for number, line in enumerate(_bounded_lines(stream, max_line_bytes), start=1):
                where = f"{path}:{number}"
                if number == 1 and line is not None and line.startswith(BYTE_ORDER_MARK):
                    notes.append(BOM_NOTE)
                    line = line.removeprefix(BYTE_ORDER_MARK)
                if line is None:
                    reason = f"the line is longer than {max_line_bytes} bytes"
                    yield Problem(
                        where, reason, "one row stands on one line: is a line break missing? else raise data.max_line_bytes"
                    )
                elif not line.strip():
                    blank += 1
                else:
                    yield _decode_line(decoder, where, line)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            fix = "the file is damaged or cut short: fetch it again"
            yield Problem(f"{path}:{number + 1}", f"broken gzip data ({error})", fix, fatal=True)
    if blank:
        notes.append(f"{blank} blank {'line was' if blank == 1 else 'lines were'} skipped.")


def _bounded_lines(stream: BinaryIO | gzip.GzipFile, max_line_bytes: int) -> Iterator[bytes | None]:
    """The lines of a stream, None for one that is too long: its end is found without holding it in memory."""
    while line := stream.readline(max_line_bytes + 1):
        if len(line) <= max_line_bytes or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(max_line_bytes + 1)
        yield None


def _decode_line(decoder: StrictDecoder, where: str, line: bytes) -> Record | Problem:
    if not line.endswith(b"\n") and not line.rstrip().endswith((b"}", b"]")):
        reason = f"truncated last line, it ends after {len(line)} bytes without a closing brace"
        return Problem(where, reason, "the file was cut short: write it again, or drop the line")
    try:
        # Without its end, or what is missing there would be reported as missing on the next line.
        value = decoder.decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return _invalid_utf8(f"{where}:{len(line[: error.start].decode()) + 1}", error)
    except json.JSONDecodeError as error:
        return Problem(f"{where}:{error.colno}", f"not JSON: {error.msg}", "expected one JSON object on this line")
    except (ValueError, RecursionError) as error:  # a number of 5000 digits, 10000 open brackets
        return Problem(where, f"not JSON that can be read: {error}")
    finally:
        complaint = decoder.take_complaints()
    if complaint:
        return Problem(where, complaint)
    if isinstance(value, list):
        return Problem(where, "expected an object, found a list", "one JSON array belongs into a .json file")
    return Record(where, value)


def _invalid_utf8(place: str, error: UnicodeDecodeError, fatal: bool = False) -> Problem:
    return Problem(place, f"invalid UTF-8 byte 0x{error.object[error.start]:02x}", "save the file as UTF-8", fatal)


def read_json(path: Path, notes: list[str], max_line_bytes: int) -> Source:
    """One array of objects; places are `file[index]`, counted from 0. The line limit has no meaning here."""
    data = path.read_bytes()
    if data.startswith(BYTE_ORDER_MARK):
        notes.append(BOM_NOTE)
        data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        before = data[: error.start].decode()
        place = f"{path}:{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"
        yield _invalid_utf8(place, error, fatal=True)
        return
    if not text.strip():
        return
    try:
        yield from _array_elements(path, text)
    except json.JSONDecodeError as error:
        fix = "a .json file holds one array of objects; one object a line belongs into .jsonl"
        yield Problem(f"{path}:{error.lineno}:{error.colno}", f"not JSON: {error.msg}", fix, fatal=True)
    except (ValueError, RecursionError) as error:
        yield Problem(str(path), f"not JSON that can be read: {error}", fatal=True)


def _array_elements(path: Path, text: str) -> Source:
    """Elements decoded one at a time, so that what is wrong inside one of them is reported at its index."""
    decoder = StrictDecoder()
    position = _expect(text, 0, "[")
    index = 0
    while index or not text.startswith("]", position):
        value, position = decoder.raw_decode(text, position)
        where = f"{path}[{index}]"
        complaint = decoder.take_complaints()
        yield Problem(where, complaint) if complaint else Record(where, value)
        position = _skip_space(text, position)
        if text.startswith("]", position):
            break
        position = _expect(text, position, ",")
        index += 1
    end = _skip_space(text, position + 1)
    if end < len(text):
        raise json.JSONDecodeError("Extra data", text, end)


def _skip_space(text: str, position: int) -> int:
    while text[position : position + 1] in {" ", "\t", "\n", "\r"}:
        position += 1
    return position


def _expect(text: str, position: int, mark: str) -> int:
    """The position of what follows `mark`, which must come next."""
    position = _skip_space(text, position)
    if not text.startswith(mark, position):
        raise json.JSONDecodeError(f"Expecting '{mark}'", text, position)
    return _skip_space(text, position + 1)


def read_parquet(path: Path, notes: list[str], max_line_bytes: int) -> Source:
    """One record a row; places are `file#row`, counted from 0. The line limit has no meaning here."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches():
            columns = dict(zip(batch.schema.names, batch.columns, strict=True))
            for index in range(batch.num_rows):
                yield Record(f"{path}#{row}", {name: column[index].as_py() for name, column in columns.items()})
                row += 1
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield Problem(f"{path}#{row}", f"not parquet that can be read: {error}", fatal=True)


READERS: dict[str, Callable[[Path, list[str], int], Source]] = {
    ".jsonl": read_jsonl,
    ".jsonl.gz": read_jsonl,
    ".json": read_json,
    ".parquet": read_parquet,
}


def read_text(path: Path, notes: list[str], max_line_bytes: int) -> Source:
    """One prompt a line, as it stands there; places are `file:line`."""
    blank = 0
    with path.open("rb") as stream:
        for number, line in enumerate(_bounded_lines(stream, max_line_bytes), start=1):
            where = f"{path}:{number}"
            if line is None:
                yield Problem(where, f"the line is longer than {max_line_bytes} bytes", "raise data.max_line_bytes")
                continue
            if number == 1 and line.startswith(BYTE_ORDER_MARK):
                notes.append(BOM_NOTE)
                line = line.removeprefix(BYTE_ORDER_MARK)
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield _invalid_utf8(f"{where}:{len(line[: error.start].decode()) + 1}", error)
                continue
            if text.strip():
                yield Record(where, {"prompt": text})
            else:
                blank += 1
    if blank:
        notes.append(f"{blank} blank {'line was' if blank == 1 else 'lines were'} skipped.")


def open_source(path: Path, notes: list[str], max_line_bytes: int, prompts: bool = False) -> Source:
    """The records of a file, its format chosen by its name; remarks on the file as a whole are added to `notes`.

    `prompts`: a .txt file is one, too. Raises DataError where there is no such file or its format is none of these.
    """
    readers = READERS | ({".txt": read_text} if prompts else {})
    *most, last = readers
    known = f"{', '.join(most)} or {last}"
    if path.is_dir():
        raise DataError(f"{path}: expected a file, found a directory; name a {known} file in it")
    if not path.exists():
        raise DataError(f"{path}: no such file")
    for extension, reader in readers.items():
        if path.name.lower().endswith(extension):
            return reader(path, notes, max_line_bytes)
    lines = "; a .txt file holds prompts, one a line: it is for ppo, grpo and generate" if path.suffix.lower() == ".txt" else ""
    raise DataError(f"{path}: unknown kind of file; expected {known}{lines}")
