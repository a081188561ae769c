"""Two runs side by side: what they were made of, where their numbers part, what they came to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.report.records import Records
from rlhf.runs.lineage import fingerprint, flat
from rlhf.runs.manifest import read_manifest

Lines = dict[tuple[int, bool], dict[str, Any]]

ABOUT = ("stage", "tokenizer", "template")
"""Of run.json, beside what a run that goes on must share (lineage.fingerprint)."""


@dataclass(frozen=True)
class Difference:
    name: str
    one: Any
    other: Any


@dataclass(frozen=True)
class RunComparison:
    made_of: list[Difference]
    """Config fields by dotted name, inputs by content, versions, machine; what says where and how often to write aside."""
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
    first = next(_parting(*lines), None) or next(_lacking(*lines), None)
    result = differences_of(*(_figures(manifest) for manifest in manifests))
    last = [max((step for step, _ in of), default=0) for of in lines]
    return RunComparison(made_of, first, (last[0], last[1]), result)


def differences_of(one: dict[str, Any], other: dict[str, Any]) -> list[Difference]:
    """In the order of `one`, and what only the other has at the end."""
    return [Difference(name, one.get(name), other.get(name)) for name in one | other if one.get(name) != other.get(name)]


def _made_of(manifest: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, manifest[name]) for name in ABOUT if name in manifest)
    yield from fingerprint(manifest).items()


def _metrics(run: Path) -> Lines:
    """Each line by its step and by whether it is of an evaluation, without what depends on the clock."""
    return {
        (line["step"], "tokens" not in line): {name: value for name, value in line.items() if not name.startswith("time/")}
        for line in Records(run / "metrics.jsonl").read()
    }


def _parting(one: Lines, other: Lines) -> Iterator[Difference]:
    """In the lines that both have."""
    for key in sorted(one.keys() & other.keys()):
        for found in differences_of(one[key], other[key]):
            yield Difference(f"step {key[0]}: {found.name}", found.one, found.other)


def _lacking(one: Lines, other: Lines) -> Iterator[Difference]:
    """Lines that only one of them has, of the steps that both have."""
    last = min(max((step for step, _ in lines), default=-1) for lines in (one, other))
    for key in sorted(key for key in one.keys() ^ other.keys() if key[0] <= last):
        there = ["recorded" if key in lines else "none" for lines in (one, other)]
        yield Difference(f"step {key[0]}: {'evaluation' if key[1] else 'metrics'}", *there)


def _figures(manifest: dict[str, Any]) -> dict[str, Any]:
    """The result without the bins of a curve."""
    return {name: value for name, value in flat(manifest["result"]).items() if not name.startswith("eval/reliability")}
