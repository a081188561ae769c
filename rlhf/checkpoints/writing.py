"""Carrying a planned conversion out: a few tensors at a time, the destination complete or not there at all."""

from __future__ import annotations

import json
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.convert import Conversion
from rlhf.checkpoints.plan import Check, Step
from rlhf.checkpoints.sinks import open_sink
from rlhf.digest import file_digest
from rlhf.errors import DataError, OutputError, StorageError, disk_failed
from rlhf.paths import beside, sync, sync_tree

MANIFEST = "conversion.json"
SCHEMA_VERSION = 1
WRITERS = 2
"""Threads that hash and write; more than two find the disk busy."""

Progress = Callable[[int], None]
"""Told how many bytes have just been written."""


def write(conversion: Conversion, progress: Progress = lambda _: None) -> None:
    """Carry a plan out. The destination appears complete, or not at all.

    Raises:
        OutputError: the destination is there already, or cannot be made.
        StorageError: the disk has no room for it.
        DataError: what must be equal, or zero, is not.
    """
    destination = conversion.request.destination
    if destination.is_symlink() or destination.name in ("", ".."):
        raise OutputError(f"{destination}: a link or a directory without a name of its own; name the directory itself")
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise OutputError(f"{destination}: is there already and not empty; name another directory, or remove it")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        partial = beside(destination)
        free = shutil.disk_usage(destination.parent).free
        if free < conversion.target.bytes:
            raise StorageError(f"{destination.parent}: {conversion.target.bytes:,} bytes are needed, {free:,} are free")
        partial.mkdir()
        try:
            _fill(conversion, partial, progress)
            sync_tree(partial)
            if destination.exists():
                destination.rmdir()
            partial.rename(destination)
            sync(destination.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    except OSError as error:
        kind = StorageError if disk_failed(error) else OutputError
        raise kind(f"{destination}: cannot be written: {error}") from error


def _fill(conversion: Conversion, directory: Path, progress: Progress) -> None:
    target = conversion.target
    for check in conversion.checks:
        hold(check)
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(WRITERS) as writers:
        source_digests = writers.submit(lambda: {file: file_digest(file) for file in conversion.source.files})
        sinks = {name: open_sink(directory, file) for name, file in target.files.items()}
        # Reading goes on beside writing, with no more in hand than the largest tensor takes.
        largest = max((step.source.bytes for step in target.steps), default=0)
        held: deque[tuple[Step, list[Future[str]]]] = deque()

        def let_go() -> None:
            step, writing = held.popleft()
            for (file, key), written in zip(step.targets, writing, strict=True):
                digests[f"{file}: {key}"] = written.result()
                progress(target.files[file].entries[key].bytes)

        for step in target.steps:
            while held and step.source.bytes + sum(other.source.bytes for other, _ in held) > largest:
                let_go()
            held.append((step, [writers.submit(sinks[file].write, key, part) for part, file, key in _parts(step)]))
        while held:
            let_go()
        list(writers.map(lambda sink: sink.close(), sinks.values()))
    for name, text in target.texts.items():
        if text:
            (directory / name).write_text(text)
    for file in conversion.carried:
        if file.name not in target.texts:
            shutil.copyfile(file, directory / file.name)
    (directory / MANIFEST).write_text(json.dumps(_manifest(conversion, source_digests.result(), digests), indent=1) + "\n")


def _parts(step: Step) -> Iterator[tuple[Tensor, str, str]]:
    whole = step.source.read()
    found, planned = (tuple(whole.shape), whole.dtype), (step.source.shape, step.source.dtype)
    if found != planned:
        raise DataError(f"{step.source.origins[0]}: is {found[0]} {found[1]}, planned as {planned[0]} {planned[1]}")
    for part, (file, key) in zip(step.split(whole), step.targets, strict=True):
        yield part, file, key


def hold(check: Check) -> None:
    """Raises DataError where what must be equal, or zero, is not."""
    found = check.stored.read()
    if check.equal_to is None:
        if found.any():
            raise DataError(f"{check.stored.origins[0]}: the family has no such bias, and this one is not zero")
    elif not torch.equal(found, check.equal_to.read()):
        raise DataError(f"{check.stored.origins[0]}: must be equal to {check.equal_to.origins[0]}, and is not")


def _manifest(conversion: Conversion, source_digests: Mapping[str, str], digests: Mapping[str, str]) -> dict[str, Any]:
    source = conversion.source
    return {
        "schema_version": SCHEMA_VERSION,
        "from": source.format,
        "to": conversion.target.format,
        "family": conversion.family.name if conversion.family else None,
        "source": str(conversion.request.source),
        "source_files": dict(source_digests),
        "tensors": dict(digests),
        "skipped": list(source.skipped),
        "warnings": conversion.warnings,
    }
