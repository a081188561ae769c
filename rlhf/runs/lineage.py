"""What a run was made from, whether that still holds, and so whether a run is new, can go on, or is done.

Inputs are compared by content: a pipeline may be moved as a whole, and a parent made again to the same bytes is the
same parent. What only has a name (a Hub id, an imported reward function, a reward service) is compared by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from rlhf.checkpoints.directory import iteration_directory
from rlhf.config.rewards import is_service
from rlhf.config.schema import Stage
from rlhf.digest import file_digest, text_digest, tree_digest
from rlhf.errors import DataError
from rlhf.models.source import require_pinned, resolve
from rlhf.runs.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    changed_files,
    is_run,
    manifest_digest,
    read_json,
    read_manifest,
    versions,
)

RunState = Literal["new", "resume", "done"]
Verdict = Literal["ok", "changed", "missing", "by name"]

INPUT_FIELDS = {
    "model": "model.path",
    "model.reference": "model.reference",
    "actor": "roles.actor",
    "reference": "roles.reference",
    "critic": "roles.critic",
    "reward": "reward.source",
    "data.train": "data.train",
    "data.eval": "data.eval",
    "data.ptx": "ptx.file",
    "data.reference": "data.reference",
    "data.pairs": "reward.pairs",
    "replay": "rollout.replay",
}
"""Input name -> config field, for the stages that have it."""

SCORERS, SOURCES = "eval.scorers", "reward.sources"
"""A list of functions, each an input by the name `eval.scorers[0]` and so on; and sections, `reward.sources.NAME.source`."""

# Config sections that say where and how often to write and when to stop, not what is computed of finite numbers.
OUTPUT_FIELDS = ("output", "report", "checkpoint", "max_hours", "non_finite", "alarms")
KEPT_FIELDS = ("rollout.record",)
"""The same, in a section of other things: a run may go on with its rollouts kept."""

# Fields that say how long to wait for scores and how many to do without, not what they are: a run that gave up may go on.
WAITING_FIELDS = ("reward.timeout_s", "reward.retries", "reward.allow_private", "reward.allow_hosts", "reward.on_failure")

WRITTEN = (
    *("model", "critic", "ema", "checkpoints", "rollouts", "profile"),
    *("metrics.jsonl", "samples.jsonl", "notes.jsonl", "alarms.jsonl"),
)
"""What a run writes, and so replaces, in its directory."""

MACHINE = ("world_size", "threads", "engine", "device")
"""With the versions of packages, what the last bits of a run in progress hang on. A finished one stays what it is elsewhere."""


@dataclass(frozen=True)
class Node:
    """One input in a run's ancestry: the name it was read under, where it is, who made it, whether it is the same."""

    name: str
    path: str
    stage: str | None
    verdict: Verdict
    inputs: tuple[Node, ...]


def inputs_of(stage: str, config: Stage) -> dict[str, dict[str, str | None]]:
    """Everything the stage reads: name -> {"path", "digest", "parent"}.

    path is relative to the run where it lies beside it, and absolute otherwise; digest is of the content, or None for
    what only has a name; parent is the digest of the run.json of the run that made it, or None.

    Raises:
        DataError: an input is missing, comes from an unfinished run, or is not what its run left.
    """
    inputs = {}
    for name, spec in specs(config):
        if config.trust_remote_code and not is_no_model(name, spec):
            require_pinned(resolve(spec))
        digest = _digest(name, spec)
        if digest is None:
            inputs[name] = {"path": spec, "digest": None, "parent": None}
            continue
        run = run_of(spec)
        if run is not None:
            _verify(run, name, _place(name, spec), reader=stage)
        parent = manifest_digest(run) if run is not None else None
        inputs[name] = {"path": _portable(spec, config.output), "digest": digest, "parent": parent}
    return inputs


def specs(config: Stage) -> Iterator[tuple[str, str]]:
    """The inputs by name, each as the config has it."""
    fields = flat(config.model_dump(mode="json"))
    scorers = {f"{SCORERS}[{place}]": spec for place, spec in enumerate(fields.get(SCORERS, ()))}
    fields |= scorers
    sources = [field for field in fields if field.startswith(SOURCES) and field.endswith(".source")]
    for name, field in (INPUT_FIELDS | {name: name for name in (*scorers, *sources)}).items():
        spec = fields.get(field)
        if spec is not None and spec != "zero":  # a critic without a model of its own
            yield name, spec


def fingerprint(manifest: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for a run to go on to the same bits: flat, by the names a person knows."""
    inputs = manifest["inputs"]
    told_by_content = {INPUT_FIELDS.get(name, name) for name, entry in inputs.items() if entry["digest"] is not None}
    config = {
        field: value
        for field, value in flat(manifest["config"]).items()
        if field.split(".")[0] not in OUTPUT_FIELDS and field not in KEPT_FIELDS + WAITING_FIELDS + tuple(told_by_content)
    }
    contents = {f"contents of {name}": entry["digest"] for name, entry in inputs.items() if entry["digest"] is not None}
    machine = {name: manifest[name] for name in MACHINE}
    packages = {f"versions.{name}": version for name, version in manifest["versions"].items()}
    return config | contents | machine | packages | {"seed": manifest["seed"]}


def differences(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """One line for each thing in which two fingerprints differ."""
    return [
        f"{name}: {_short(recorded.get(name))} -> {_short(now.get(name))}"
        for name in sorted(recorded | now)
        if recorded.get(name) != now.get(name)
    ]


def state_of(
    run: Path,
    stage: str,
    config: Stage,
    machine: Mapping[str, Any] = MappingProxyType({}),
    allow_inexact: bool = False,
) -> RunState:
    """What starting the stage with this config in this directory would mean.

    Args:
        machine: what is known of the run about to start; of `MACHINE`, what is missing is not compared.
        allow_inexact: go on with an unfinished run whatever has changed.

    Raises:
        DataError: the directory holds a run of something else, or a finished one whose files have changed; or, as
            `inputs_of`, an input is not fit to be read.
    """
    inputs = inputs_of(stage, config)
    if not (run / MANIFEST).is_file():
        if not_ours := [name for name in WRITTEN if (run / name).exists()]:
            raise DataError(f"{run / not_ours[0]}: no run of ours made it, as {run} has no {MANIFEST}; choose another --output")
        return "new"
    manifest = read_manifest(run)
    if manifest["schema_version"] != SCHEMA_VERSION:
        raise DataError(
            f"{run / MANIFEST}: schema_version {manifest['schema_version']}; this rlhf reads {SCHEMA_VERSION}; "
            "choose another --output"
        )
    if manifest["stage"] != stage:
        raise DataError(f"{run}: holds a run of {manifest['stage']}, not of {stage}; choose another --output")
    finished = manifest["finished"] is not None
    if not finished and not any(not path.name.startswith(".tmp-") for path in (run / "checkpoints").glob("*")):
        return "new"  # it ended before there was anything to go on from
    changes = _changes(manifest, config, inputs, machine, whatever_the_machine=finished)
    if changes and finished:
        raise _stale(f"{run}: holds a finished {stage} run of something else", changes, f"or delete {run}")
    if changes and not allow_inexact:
        raise inexact(run, stage, changes)
    if not finished:
        return "resume"
    if changed := changed_files(run, manifest):
        raise DataError(f"{run}: changed since this {stage} run finished: {_listed(changed)}; delete it to make it again")
    return "done"


def inexact(run: Path, stage: str, changes: list[str]) -> DataError:
    """That going on with the run would not give the bits it would have given."""
    way_out = "or --allow-inexact-resume to go on all the same (it is recorded)"
    if processes := next((change.split()[1] for change in changes if change.startswith("world_size: ")), ""):
        way_out = f"start it with --nproc {processes} as before, {way_out}"
    return _stale(f"{run}: the unfinished {stage} run here cannot go on exactly", changes, way_out)


def chain(run: Path) -> tuple[Node, ...]:
    """The inputs of a run, their runs' inputs and so on, each checked against what was recorded."""
    return tuple(_nodes(run, read_json(run / MANIFEST)["inputs"], frozenset({run.resolve()})))


def _nodes(run: Path, inputs: dict[str, Any], below: frozenset[Path]) -> Iterator[Node]:
    """`below`: runs whose inputs are being told already, should one have been made from itself."""
    for name, entry in inputs.items():
        if entry["digest"] is None:
            yield Node(name, entry["path"], None, "by name", ())
            continue
        path = os.path.normpath(run / entry["path"])
        maker = run_of(path)
        verdict = _verdict(name, path, entry["digest"])
        if maker is None:
            yield Node(name, path, None, verdict, ())
            continue
        made, place = read_json(maker / MANIFEST), maker.resolve()
        inner = () if place in below else tuple(_nodes(maker, made["inputs"], below | {place}))
        yield Node(name, path, made["stage"], verdict, inner)


def _verdict(name: str, path: str, recorded: str) -> Verdict:
    try:
        return "ok" if _digest(name, path) == recorded else "changed"
    except DataError:
        return "missing"


def _digest(name: str, spec: str) -> str | None:
    """Digest of the content a config field names; None for what only has a name."""
    digest = content(name, spec)
    return None if digest is None else digest()


def content(name: str, spec: str) -> Callable[[], str] | None:
    """What a config field names, found and not yet read: to call for its digest. None for what only has a name.

    Raises:
        DataError: it is not there.
    """
    field = INPUT_FIELDS.get(name, name)
    if name.startswith("data."):
        return partial(file_digest, _file(Path(spec), field))
    if name == "replay":
        return partial(tree_digest, _place(name, spec))
    if is_no_model(name, spec):
        file, _, function = spec.rpartition(":")
        if is_service(spec) or spec.startswith("count:") or not file.endswith(".py"):
            return None
        path = _file(Path(file), field)
        return lambda: text_digest(f"{file_digest(path)}:{function}")
    source = resolve(spec, "critic" if name == "critic" else "model")
    if source.kind == "hub":
        return None
    if source.kind == "megatron":
        return partial(tree_digest, iteration_directory(Path(source.path)))
    return partial(tree_digest if source.kind == "directory" else file_digest, source.path)


def is_no_model(name: str, spec: str) -> bool:
    return name.startswith(("data.", "replay", SCORERS)) or (name.startswith("reward") and ":" in spec)


def _place(name: str, spec: str) -> Path:
    """Of a run that is replayed, its rollouts are read and nothing else."""
    return Path(spec) / "rollouts" if name == "replay" else Path(spec)


def _file(path: Path, field: str) -> Path:
    try:
        found = path.is_file()
    except OSError as error:  # a name that is too long
        raise DataError(f"{field}: no file {path}: {error.strerror}") from error
    if not found:
        raise DataError(f"{field}: no file {path}" + (" (it is a directory)" if path.is_dir() else ""))
    return path


def run_of(spec: str) -> Path | None:
    """The run that an input is, or lies in."""
    path = Path(spec)
    return next((place for place in (path, path.parent) if is_run(place)), None)


def _verify(run: Path, name: str, path: Path, reader: str) -> None:
    manifest = read_json(run / MANIFEST)
    critic = name == "critic" and manifest["stage"] == "ppo"
    output = path.relative_to(run).parts[0] if path != run else "critic" if critic else "model"
    if output not in manifest["outputs"]:
        return
    if changed := changed_files(run, manifest, output):
        raise DataError(
            f"{name}: {run} has changed since its {manifest['stage']} run finished: {_listed(changed)}. "
            f"What {reader} would learn from it is not what was made; make {run} again, or name another {name}"
        )


def _portable(spec: str, output: str) -> str:
    path, run = Path(spec).absolute(), Path(output).absolute()
    return os.path.relpath(path, run) if path.is_relative_to(run.parent) else str(path)


def _changes(
    manifest: dict[str, Any], config: Stage, inputs: dict[str, Any], machine: Mapping[str, Any], whatever_the_machine: bool
) -> list[str]:
    planned = {
        "config": config.model_dump(mode="json"),
        "inputs": inputs,
        "seed": config.seed,
        "versions": versions(),
        **{name: machine.get(name, manifest[name]) for name in MACHINE},
    }

    def compared(fingerprint: dict[str, Any]) -> dict[str, Any]:
        of_machine = (name for name in fingerprint if name in MACHINE or name.startswith("versions."))
        left_out = set(of_machine) if whatever_the_machine else set()
        return {name: value for name, value in fingerprint.items() if name not in left_out}

    return differences(compared(fingerprint(manifest)), compared(fingerprint(planned)))


def _stale(what: str, changes: list[str], way_out: str) -> DataError:
    lines = "".join(f"\n  {change}" for change in changes)
    return DataError(f"{what} (recorded -> now):{lines}\nchoose another --output, {way_out}")


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Everything in a tree of dicts, by dotted names."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _short(value: Any) -> str:
    """A digest by its first characters; all else as it is written in a config."""
    if value is None:
        return "none"
    return value[:12] if isinstance(value, str) and len(value) == 64 else str(value)


def _listed(files: list[str]) -> str:
    return ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
