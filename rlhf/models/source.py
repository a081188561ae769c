"""What the user means by a model: a run, a Hugging Face directory, a Megatron checkpoint, a GGUF file or a Hub id.

Decided from names and small files alone: torch is not needed, and nothing is downloaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf.checkpoints.directory import TRACKER, is_megatron
from rlhf.errors import ConfigError, DataError

Role = Literal["model", "critic"]

HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Source:
    """Where a model's files are: `path` is a directory, a .gguf file or a Hub id; `run` is the run that made it."""

    kind: Literal["hub", "directory", "megatron", "gguf"]
    path: str
    revision: str | None
    run: Path | None


COMMIT = re.compile(r"[0-9a-f]{40}")


def resolve(spec: str, role: Role = "model") -> Source:
    """Find the model a user names.

    Args:
        spec: a run directory, a directory with config.json or adapter_config.json, a Megatron checkpoint, a .gguf file, or a
            Hub id `owner/name@revision`.
        role: `critic` takes the critic of a PPO run where `model` takes its actor; for all others they are the same.

    Raises:
        DataError: nothing of the kind is there; the message says what was looked for.
    """
    path = Path(spec)
    try:
        is_directory = path.is_dir()
    except OSError as error:  # a name that is too long
        raise DataError(f"{spec}: no such model: {error.strerror}") from error
    if is_directory:
        return _in_directory(path, role)
    if path.is_file():
        if path.suffix != ".gguf":
            raise DataError(f"{spec}: a model is a directory, a .gguf file or a Hub id; this is a file of another kind")
        return Source("gguf", str(path), None, None)
    hub = HUB_ID.fullmatch(spec)
    if hub and not _means_a_path(spec):
        return Source("hub", hub["name"], hub["revision"], None)
    raise DataError(
        f"{spec}: no such model. Looked for a run directory, a directory with config.json or adapter_config.json, "
        "and a .gguf file of this name; a Hub id has the form owner/name or owner/name@revision"
    )


def require_pinned(source: Source) -> None:
    """Raises ConfigError for a Hub model whose code may be run and might be another one tomorrow."""
    if source.kind == "hub" and not COMMIT.fullmatch(source.revision or ""):
        raise ConfigError(
            f"trust_remote_code: {source.path} must be pinned, as its code is run: write {source.path}@COMMIT, "
            "the 40 hex digits of a commit that you have read"
        )


def _means_a_path(spec: str) -> bool:
    """`runs` is where the shipped configs write, whether or not anything is there yet."""
    first = spec.split("/")[0]
    return spec.endswith(".gguf") or first in (".", "..", "~", "runs") or Path(first).is_dir()


def _in_directory(path: Path, role: Role) -> Source:
    if (path / "run.json").is_file():
        return Source("directory", str(_result_of_run(path, role)), None, path)
    if is_megatron(path):  # before config.json, which converters leave beside the weights
        return Source("megatron", str(path), None, None)
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return Source("directory", str(path), None, None)
    if any(path.glob("iter_*")):
        raise DataError(f"{path}: looks like a Megatron checkpoint, but has no {TRACKER}; name one of its iterations")
    raise DataError(
        f"{path}: not a model: it has no config.json (Hugging Face model), no adapter_config.json (LoRA adapter) "
        f"and no run.json (a run of ours). It holds {_contents(path)}"
    )


def _result_of_run(run: Path, role: Role) -> Path:
    try:
        manifest = json.loads((run / "run.json").read_text())
        stage, finished = manifest["stage"], manifest["finished"]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{run / 'run.json'}: not the manifest of a run of ours ({error!r})") from error
    if not finished:
        raise DataError(f"{run}: this {stage} run is not finished; finish it first: the command that started it goes on")
    result = run / ("critic" if role == "critic" and stage == "ppo" else "model")
    if not result.is_dir():
        raise DataError(f"{run}: this {stage} run has no {result.name}/")
    return result


def _contents(path: Path) -> str:
    names = sorted(child.name for child in path.iterdir())
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") if names else "nothing"
