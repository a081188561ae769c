"""What `rlhf convert` prints: the plan, the progress, the proof."""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from rlhf.checkpoints.convert import Conversion, Request, plan
from rlhf.checkpoints.hugging_face import read_config, read_tensors
from rlhf.checkpoints.writing import write
from rlhf.errors import CheckFailed


def convert(request: Request, dry_run: bool, verify: bool, reference: Path | None, as_json: bool) -> int:
    """Runs the command; 0, or an RlhfError is raised."""
    conversion = plan(request)
    if reference is not None:  # hours before it is asked for
        read_config(reference)
        read_tensors(reference)
    if dry_run:
        print(json.dumps(_described(conversion), indent=1) if as_json else "\n".join(_lines(conversion)))
        return 0
    for warning in conversion.warnings:
        print(f"convert  warning: {warning}", file=sys.stderr)
    _give_memory_back_at_once()
    with _progress(conversion.target.bytes) as advance:
        write(conversion, advance)
    outcome: dict[str, Any] = {
        "destination": str(request.destination),
        "from": conversion.source.format,
        "to": conversion.target.format,
        "tensors": len(conversion.target.steps),
        "bytes": conversion.target.bytes,
        "warnings": conversion.warnings,
    }
    if verify:
        from rlhf.checkpoints.verify import verify as prove

        try:
            verdict = prove(conversion, reference)
        except CheckFailed as error:
            raise CheckFailed(f"{error}\n{request.destination} stays where it is, and is unproven") from error
        outcome["verified"] = {**vars(verdict), "holds": verdict.holds}
        if not as_json:
            print(f"convert  verified {verdict}")
    if as_json:
        print(json.dumps(outcome, indent=1))
    else:
        print(f"convert  {conversion.source.format} -> {conversion.target.format}: {request.destination}")
        for skipped in _without_repeats(conversion.source.skipped):
            print(f"convert  left out: {skipped}")
    return 0


def _lines(conversion: Conversion) -> Iterator[str]:
    source, target = conversion.source, conversion.target
    yield f"from  {source.format}: {conversion.request.source}"
    yield f"to    {target.format}: {conversion.request.destination} ({len(target.files)} files, {target.bytes:,} bytes)"
    if conversion.family:
        yield f"      family {conversion.family.name}, {source.heads}"
    for step in target.steps:
        yield f"\n{step.ours} {list(step.source.shape)}"
        for origin in step.source.origins:
            yield f"  <- {origin}"
        yield f"     {'; '.join((*step.source.how, step.how))}"
        for file, key in step.targets:
            yield f"  -> {file}: {key} {list(target.files[file].entries[key].shape)}"
    yield ""
    for check in conversion.checks:
        yield f"checked  {check.key}: {'equal to ' + check.equal_to.origins[0] if check.equal_to else 'zero'}"
    for skipped in _without_repeats(source.skipped):
        yield f"left out  {skipped}"
    for file in conversion.carried:
        yield f"carried  {file}"
    for warning in conversion.warnings:
        yield f"warning  {warning}"


def _described(conversion: Conversion) -> dict[str, Any]:
    target = conversion.target
    steps = [
        {
            "name": step.ours,
            "shape": list(step.source.shape),
            "sources": list(step.source.origins),
            "operations": [*step.source.how, step.how],
            "targets": [f"{file}: {key}" for file, key in step.targets],
        }
        for step in target.steps
    ]
    return {
        "from": conversion.source.format,
        "to": target.format,
        "bytes": target.bytes,
        "family": conversion.family.name if conversion.family else None,
        "steps": steps,
        "warnings": conversion.warnings,
    }


def _without_repeats(lines: tuple[str, ...]) -> list[str]:
    return list(dict.fromkeys(lines))


def _give_memory_back_at_once() -> None:
    """glibc keeps freed blocks of up to 32 MB for later, a tenth of a small model; from now on those of a megabyte go back.

    Source: mallopt(3), M_MMAP_THRESHOLD (-3).
    """
    with suppress(OSError, AttributeError):  # another system has another allocator
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    columns = (TextColumn("convert"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("convert", total=total)
        yield lambda written: bar.advance(task, written)
