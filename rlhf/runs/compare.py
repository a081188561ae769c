"""Two runs side by side: what they were made of, where their numbers part, what they came to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.runs.manifest import read_manifest

ABOUT = ("stage", "seed", "world_size", "threads", "engine", "device", "tokenizer", "template")


@dataclass(frozen=True)
class Difference:
    name: str
    one: Any
    other: Any


@dataclass(frozen=True)
class RunComparison:
    made_of: list[Difference]
    """Config fields by dotted name, inputs by digest, versions, machine; where output goes aside."""
    first: Difference | None
    """The metric that differs first, as `step N: NAME`; None where all that both have is equal to the bit."""
    steps: tuple[int, int]
    result: list[Difference]

    @property
    def equal(self) -> bool:
        return not self.made_of and self.first is None and not self.result and self.steps[0] == self.steps[1]

    def as_json(self) -> dict[str, Any]:
        return {"equal": self.equal, **asdict(self)}


def compare_runs(one: Path, other: Path) -> RunComparison:
    """Raises DataError where one of them has no run.json of ours."""
    manifests = read_manifest(one), read_manifest(other)
    lines = _metrics(one), _metrics(other)
    made_of = differences_of(*(dict(_made_of(manifest)) for manifest in manifests))
    first = next(_parting(*lines), None)
    result = differences_of(*(dict(flattened(manifest["result"])) for manifest in manifests))
    last = [max((line["step"] for line in of), default=0) for of in lines]
    return RunComparison(made_of, first, (last[0], last[1]), result)


def differences_of(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """In the order of `one`, and what only the other has at the end."""
    return [Difference(name, one.get(name), other.get(name)) for name in one | other if one.get(name) != other.get(name)]


def flattened(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in a tree of dicts."""
    if isinstance(value, dict):
        for key, below in value.items():
            yield from flattened(below, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _made_of(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, manifest[name]) for name in ABOUT if name in manifest)
    yield from ((name, value) for name, value in flattened(manifest["config"]) if name != "output")
    yield from ((f"versions.{name}", version) for name, version in manifest["versions"].items())
    # An input is its bytes: by another path it is the same one.
    yield from ((f"inputs.{name}", given.get("digest", given)) for name, given in manifest["inputs"].items())


def _metrics(run: Path) -> list[dict[str, Any]]:
    """Without what depends on the clock."""
    file = run / "metrics.jsonl"
    if not file.is_file():
        return []
    lines = (json.loads(line) for line in file.read_bytes().split(b"\n")[:-1])
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def _parting(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> Iterator[Difference]:
    for mine, theirs in zip(one, other, strict=False):
        for found in differences_of(mine, theirs):
            yield Difference(f"step {mine['step']}: {found.name}", found.one, found.other)
