"""`rlhf compare`: two runs, or two checkpoints, and where they part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf.config.arguments import Parser
from rlhf.errors import DataError, UsageError
from rlhf.runs.manifest import MANIFEST

USAGE = """\
rlhf compare A B [--weights] [--json]

  A and B are two runs: what differs in config, data (by digest), versions and machine; the first step and metric in which
  they part (what is under time/ aside); their results. Or two model directories, or with --weights the results of two runs:
  tensor by tensor, the largest relative difference first.
  Exit 0: equal to the bit; 1: not."""

SHOWN = 10


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("one", metavar="A", type=Path)
    parser.add_argument("other", metavar="B", type=Path)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)
    places = given.one, given.other
    for place in places:
        if not place.is_dir():
            raise DataError(f"{place}: no such directory; compare takes two runs, or two model directories")
    runs = [(place / MANIFEST).is_file() for place in places]
    if all(runs) and not given.weights:
        found, lines = _runs(*places)
    else:
        if any(runs) and not all(runs) and not given.weights:
            raise UsageError(f"{places[not runs[0]]} is no run and the other is; --weights compares the run's model with it")
        found, lines = _weights(*(_model(place) for place in places))
    print(json.dumps(found, indent=2) if given.as_json else "\n".join(lines))
    return 0 if found["equal"] else 1


def _runs(one: Path, other: Path) -> tuple[dict[str, Any], list[str]]:
    from rlhf.report.compare import compare_runs

    found = compare_runs(one, other)
    lines = [f"made of   {part.name}: {_short(part.one)} | {_short(part.other)}" for part in found.made_of]
    lines = lines or ["made of   the same: config, data, versions, machine"]
    if found.first is None:
        lines.append(f"metrics   equal to the bit in all steps that both have ({min(found.steps)})")
    else:
        lines.append(f"metrics   part at {found.first.name}: {_short(found.first.one)} | {_short(found.first.other)}")
    if found.steps[0] != found.steps[1]:
        lines.append(f"steps     {found.steps[0]} | {found.steps[1]}")
    for part in found.result:
        both = [value for value in (part.one, part.other) if isinstance(value, int | float)]
        change = f"  ({both[1] - both[0]:+.4g})" if len(both) == 2 else ""
        lines.append(f"result    {part.name}: {_short(part.one)} | {_short(part.other)}{change}")
    return found.as_json(), lines


def _weights(one: Path, other: Path) -> tuple[dict[str, Any], list[str]]:
    from rlhf.checkpoints.compare import compare_weights

    found = compare_weights(one, other)
    lines = [f"{found.equal} of {found.tensors} tensors are equal to the bit"]
    lines += [f"  {part.name}: {part.what}" for part in found.differing[:SHOWN]]
    if len(found.differing) > SHOWN:
        lines.append(f"  and {len(found.differing) - SHOWN} more, which differ less (--json has all)")
    return found.as_json(), lines


def _model(place: Path) -> Path:
    return place / "model" if (place / MANIFEST).is_file() else place


def _short(value: Any) -> str:
    text = "none" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
