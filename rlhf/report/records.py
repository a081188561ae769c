"""The record of a run: one JSON object a line, keyed by step, cut back to the checkpoint when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rlhf.errors import DataError
from rlhf.paths import sync

NOTES = "notes.jsonl"
"""What a stage said beside its figures: lines of `step` (how many were done) and `text`."""


class Records:
    """metrics.jsonl, samples.jsonl or notes.jsonl. `step` is the first key of every line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, step: int, values: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}, ensure_ascii=False) + "\n")

    def append_once(self, step: int, values: dict[str, Any]) -> None:
        """As `append`, unless the very line is there: a run killed after its last checkpoint evaluates again."""
        if {"step": step, **values} not in self.read():
            self.append(step, values)

    def read(self) -> list[dict[str, Any]]:
        """Every complete line; a line cut short by a kill is left out.

        Raises:
            DataError: a line is not one of ours.
        """
        if not self.path.exists():
            return []
        lines = self.path.read_bytes().split(b"\n")  # a kill may leave half a character
        return [self._record(number, line) for number, line in enumerate(lines[:-1], start=1)]

    def _record(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{self.path}:{number}: not valid JSON: {error}; remove the line") from error
        if not isinstance(record, dict) or "step" not in record:
            raise DataError(f"{self.path}:{number}: expected an object with a step, as a run writes it; remove the line")
        return record

    def cut(self, step: int) -> None:
        """Leaves only what was known when `step` steps were done, so that a resumed run repeats no line."""
        if not self.path.exists():
            return
        self._replace([record for record in self.read() if record["step"] <= step])

    def mend(self) -> None:
        """Leaves out a line cut short by a kill, which the next one would else be written behind."""
        if self.path.exists():
            self._replace(self.read())

    def _replace(self, kept: list[dict[str, Any]]) -> None:
        partial = self.path.with_name(f".{self.path.name}-{os.getpid()}")
        partial.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept), encoding="utf-8")
        sync(partial)
        partial.replace(self.path)

    def sync(self) -> None:
        """What was appended is on disk: before a checkpoint is that says it was."""
        if self.path.exists():
            sync(self.path)
