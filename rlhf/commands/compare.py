"""`rlhf compare`: two runs, two checkpoints, or two recordings of a forward pass, and where they part."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from rlhf.config.arguments import Parser
from rlhf.errors import DataError, UsageError
from rlhf.runs.manifest import MANIFEST, is_run

USAGE = """\
rlhf compare A B [--weights] [--config DIR] [--tolerance X] [--json]
rlhf compare MODEL --record FILE.safetensors [--precision fp32|bf16|fp8] [--device cpu|cuda] [--data FILE] [--json]

  A and B are two runs: what differs in config, data (by digest), versions and machine; the first step and metric in
  which they part (what is under time/ aside); their results. Or two models, or with --weights the results of two runs:
  tensor by tensor, the largest relative difference first. A Megatron checkpoint is read as `rlhf convert` would read it.
    --config DIR      a Hugging Face directory of the same model, where a Megatron checkpoint says too little of itself
  Or two recordings: the first module whose output differs, with the two values. --record writes one: what each module
  of MODEL gives on the same tokens, drawn from a fixed seed or the first rows of --data; so it is done once for each
  precision, device, version or model. `rlhf compare MODEL --record FILE --help` lists all that it takes.
    --tolerance X     relative error of a module's output up to which it counts as equal (default: 0)
  Exit 0: equal to the bit, or within the tolerance; 1: not."""

SHOWN = 10
MODULES_SHOWN = 40
"""Where a recording has more, the table has the layers as wholes, what stands outside of them, and where the two part."""
RECORDING = ".safetensors"


def run(argv: list[str]) -> int:
    if any(word.partition("=")[0] == "--record" for word in argv):
        return _record(argv)
    parser = Parser(USAGE)
    parser.add_argument("one", metavar="A", type=Path)
    parser.add_argument("other", metavar="B", type=Path)
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--tolerance", type=float)
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)
    if given.tolerance is not None and not (math.isfinite(given.tolerance) and given.tolerance >= 0):
        raise UsageError(f"--tolerance {given.tolerance}: expected a relative error, a number of at least 0")
    places = given.one, given.other
    recordings = [place.suffix == RECORDING and place.is_file() for place in places]
    for place, recording in zip(places, recordings, strict=True):
        if not place.is_dir() and not recording:
            raise DataError(f"{place}: no such directory; compare takes two runs, two models, or two recordings")
        stages = sorted(file.parent.name for file in place.glob(f"*/{MANIFEST}") if is_run(file.parent))
        if stages and not is_run(place):
            raise UsageError(f"{place} is a pipeline: compare its stages one by one ({', '.join(stages)})")
    runs = [is_run(place) for place in places]
    of_runs, of_recordings = all(runs) and not given.weights, any(recordings)
    for flag, value, meant in (
        ("--tolerance", given.tolerance is not None, of_recordings),
        ("--weights", given.weights, not of_recordings),
        ("--config", given.config is not None, not of_runs and not of_recordings),
    ):
        if value and not meant:
            what = "recordings" if of_recordings else "runs" if of_runs else "models"
            raise UsageError(f"{flag}: has no meaning for two {what}; leave it out")
    if of_recordings:
        if not all(recordings):
            raise UsageError(f"{places[recordings[0]]} is no recording and the other is; --record makes one of a model")
        found, lines = _recordings(given.one, given.other, given.tolerance or 0.0)
    elif of_runs:
        found, lines = _runs(*places)
    else:
        if any(runs) and not all(runs) and not given.weights:
            raise UsageError(f"{places[runs[0]]} is no run and the other is; --weights compares the run's model with it")
        found, lines = _weights(_model(given.one), _model(given.other), given.config)
    print(json.dumps(found, indent=2) if given.as_json else "\n".join(lines))
    return 0 if found["equal"] else 1


def _record(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("compare", argv)

    from rlhf.training.record_command import record

    return record(invocation)


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


def _weights(one: Path, other: Path, config: Path | None) -> tuple[dict[str, Any], list[str]]:
    from rlhf.checkpoints.compare import compare_weights
    from rlhf.checkpoints.directory import is_megatron

    if config is not None and not (is_megatron(one) or is_megatron(other)):
        raise UsageError("--config: is for a Megatron checkpoint, and neither of the two is one; leave it out")
    found = compare_weights(one, other, config)
    lines = [f"{found.equal} of {found.tensors} tensors are equal to the bit"]
    lines += [f"  {part.name}: {part.what}" for part in found.differing[:SHOWN]]
    if len(found.differing) > SHOWN:
        lines.append(f"  and {len(found.differing) - SHOWN} more (--json has all)")
    return found.as_json(), lines


def _recordings(one: Path, other: Path, tolerance: float) -> tuple[dict[str, Any], list[str]]:
    from rlhf.models.recordings import compare_recordings

    found = compare_recordings(one, other, tolerance)
    lines = [f"made of   {name}: {_short(a)} | {_short(b)}" for name, (a, b) in found.made_of.items()]
    shown = found.outputs
    if len(shown) > MODULES_SHOWN:
        shown = [part for part in shown if part is found.first or not re.search(r"\.\d+\.", part.name)]
        lines.append(f"modules   {len(shown)} of {len(found.outputs)} are shown, layers as wholes (--json has all)")
    width = max((len(part.name) for part in shown), default=0)
    for part in shown:
        told = part.what or f"relative error {part.relative:.2e}, largest {part.largest:.2e}"
        lines.append(f"  {part.name:{width}}  {told}{', ' if part.types else ''}{part.types}")
    if (first := found.first) is None:
        lines.append(f"outputs   {'equal to the bit' if tolerance == 0 else f'within {tolerance:g}'} in all of them")
    else:
        told = first.what or f"at {first.place} {first.one:.9g} | {first.other:.9g}, relative error {first.relative:.2e}"
        lines.append(f"outputs   part at {first.name}: {told}{', ' if first.types else ''}{first.types}")
    return found.as_json(), lines


def _model(place: Path) -> Path:
    return place / "model" if is_run(place) else place


def _short(value: Any) -> str:
    text = "not there" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
