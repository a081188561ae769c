"""run.json and status.json: what a run was made of, what it left, and how it ended.

run.json is written twice: when a stage starts (`new_manifest`; nothing finished yet) and when it ends (`finish`).
status.json says what is going on now; it is the contract on how a run ended, since launchers rewrite exit codes
(torchrun returns 1 for everything). Checkpoints have a manifest of their own (rlhf/training).
"""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from rlhf.digest import file_digest, file_digests, text_digest, tree_digest
from rlhf.errors import DataError, without_secrets
from rlhf.paths import sync

SCHEMA_VERSION = 1

State = Literal["running", "done", "failed", "preempted"]

MANIFEST = "run.json"
STATUS = "status.json"
LAUNCH = "RLHF_LAUNCH"
"""Environment variable in which a stage is told the flags of `rlhf` that started its processes."""


def _is_time(value: Any) -> bool:
    """One that says its zone, as `now` does: another cannot be put in order with ours."""
    try:
        return datetime.fromisoformat(value).tzinfo is not None
    except (TypeError, ValueError):
        return False


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kinds)


OF_MANIFESTS: dict[str, Callable[[Any], bool]] = {
    "schema_version": _is(int),
    "stage": _is(str),
    "inputs": _is(dict),
    "result": _is(dict),
    "started": _is_time,
    "finished": lambda value: value is None or _is_time(value),
}
OF_STATUSES: dict[str, Callable[[Any], bool]] = {
    "state": lambda value: value in get_args(State),
    "reason": _is(str),
    "exit_code": _is(int, NoneType),
    "pid": _is(int),
    "host": _is(str),
    "time": _is_time,
}
"""By what a file of that name is known to be ours: other tools write some, too."""


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step: a reader, or a start after a crash, sees the old content or the new, no part."""
    partial = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with partial.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync(path.parent)  # or the new name itself may be lost with the power


def read_json(path: Path) -> Any:
    """Raises: DataError: the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON: {error}") from error


def read_manifest(run: Path) -> dict[str, Any]:
    """run.json of a run.

    Raises:
        DataError: it is not JSON, or not the manifest of a run of ours.
    """
    manifest = read_json(run / MANIFEST)
    if not isinstance(manifest, dict) or not all(fits(manifest.get(name)) for name, fits in OF_MANIFESTS.items()):
        raise DataError(f"{run / MANIFEST}: not the manifest of a run of ours")
    return manifest


def is_run(directory: Path) -> bool:
    """Whether a run.json of ours is in it: other tools write files of that name."""
    try:
        return bool(read_manifest(directory))
    except (DataError, FileNotFoundError, NotADirectoryError):
        return False


def has_status(directory: Path) -> bool:
    """Whether a status.json of ours is in it."""
    try:
        return read_status(directory) is not None
    except DataError:
        return False


def standing(run: Path, manifest: dict[str, Any]) -> str:
    """How the run stands: a State, or `unknown` where it left no word."""
    if manifest.get("finished") is not None:  # a kill may come between the last writes of run.json and status.json
        return "done"
    status = read_status(run)
    return status["state"] if status else "unknown"


def versions() -> dict[str, str]:
    """Of everything that can change a run's bits; DeepSpeed's where it is installed."""
    packages = ["rlhf", "torch", "transformers", "accelerate", "peft"]
    packages += ["deepspeed"] if find_spec("deepspeed") else []
    return {"python": platform.python_version()} | {name: metadata.version(name) for name in packages}


def new_manifest(
    stage: str,
    config_json: dict[str, Any],
    command: list[str],
    seed: int,
    world_size: int,
    threads: int,
    inputs: dict[str, dict[str, Any]],
    versions: dict[str, str],
    engine: str = "",
    device: str = "",
) -> dict[str, Any]:
    """What run.json holds when a stage starts; the stage adds the digests `tokenizer` and `template`.

    Args:
        inputs: of `lineage.inputs_of`.
        threads: CPU threads of each process; a sum over another number of threads differs in its last bits.
        engine: what divides the work between processes.
        device: what computes; another one rounds differently.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "rlhf_version": versions["rlhf"],
        "stage": stage,
        "command": command,
        "launch": os.environ.get(LAUNCH, ""),
        "config": config_json,
        "versions": versions,
        "seed": seed,
        "world_size": world_size,
        "threads": threads,
        "engine": engine,
        "device": device,
        "inputs": inputs,
        "outputs": {},
        "files": {},
        "result": {},
        "started": now(),
        "finished": None,
    }


def finish(run: Path, manifest: dict[str, Any], result: dict[str, Any], outputs: Iterable[str] = ("model",)) -> None:
    """Write the final run.json, with digests of the outputs, then the status `done`.

    Args:
        result: the final metrics.
        outputs: names of files or directories in the run that later stages read.
    """
    paths = {name: run / name for name in outputs}
    ended = {
        "outputs": {name: tree_digest(path) if path.is_dir() else file_digest(path) for name, path in paths.items()},
        "files": {file: digest for name in paths for file, digest in _files(run, name).items()},
        "result": result,
        "finished": now(),
    }
    write_json(run / MANIFEST, manifest | ended)
    write_status(run, "done", exit_code=0)


def changed_files(run: Path, manifest: dict[str, Any], output: str | None = None) -> list[str]:
    """Files of a finished run's outputs (or of one of them) that are not what they were, are missing, or are new."""
    names = manifest["outputs"] if output is None else [output]
    recorded = {file: digest for file, digest in manifest["files"].items() if file.split("/")[0] in names}
    present = {file: digest for name in names for file, digest in _files(run, name).items()}
    return sorted(file for file in recorded | present if recorded.get(file) != present.get(file))


def manifest_digest(run: Path) -> str:
    """Digest of run.json: which run this was, not only which bytes it made."""
    return text_digest((run / MANIFEST).read_text(encoding="utf-8"))


def write_status(run: Path, state: State, reason: str = "", exit_code: int | None = None) -> None:
    """Say how the run is doing; `reason` is one sentence for a person."""
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "time": now()}
    write_json(run / STATUS, {"state": state, "reason": without_secrets(reason), "exit_code": exit_code, **owner})


def read_status(run: Path) -> dict[str, Any] | None:
    """None where the directory is no run, or its stage has not come as far as to say anything.

    Raises:
        DataError: it is not JSON, or not the status of a run of ours.
    """
    if not (run / STATUS).is_file():
        return None
    status = read_json(run / STATUS)
    if not isinstance(status, dict) or not all(fits(status.get(name)) for name, fits in OF_STATUSES.items()):
        raise DataError(f"{run / STATUS}: not the status of a run of ours")
    return status


def say_done(run: Path) -> None:
    """A kill between the last writes of run.json and status.json leaves a finished run that says it is running."""
    status = read_status(run)
    if status is None or status["state"] != "done":
        write_status(run, "done", exit_code=0)


def seconds(manifest: dict[str, Any]) -> float:
    """Wall time from the run's start to its end, pauses included."""
    started, finished = (datetime.fromisoformat(manifest[name]) for name in ("started", "finished"))
    return (finished - started).total_seconds()


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _files(run: Path, name: str) -> dict[str, str]:
    path = run / name
    if path.is_dir():
        return {f"{name}/{file}": digest for file, digest in file_digests(path).items()}
    return {name: file_digest(path)} if path.is_file() else {}
