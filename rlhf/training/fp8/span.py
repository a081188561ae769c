"""A run in FP8 that checks itself: now and then the next steps are run without FP8 first, then with it, and compared.

    RUN/fp8_probe/step-N/   metrics.jsonl, samples.jsonl of the span without FP8; verdict.json

The stage knows nothing of it: it is given the same step numbers twice. A checkpoint is saved where the span begins and none
inside, so a run killed inside begins the span again. Source of the idea: 01-AI's reference runs of 100 to 200 steps in BF16.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlhf.errors import CheckFailed
from rlhf.fp8.apply import switched_off
from rlhf.fp8.state import fp8_state, load_fp8_state
from rlhf.report.records import Records
from rlhf.training.optimization import optimizer_tensors, restore_optimizer

if TYPE_CHECKING:
    from rlhf.training.session import Training

COMPARED = ("loss", "reward/score")
"""The metric of a stage that is compared: the first it has."""
RELATIVE = 2e-3
STANDARD_ERRORS = 2.0


@dataclass(frozen=True)
class SpanVerdict:
    """Means over the span, and their difference step by step."""

    metric: str
    without: float
    fp8: float
    gap: float
    standard_error: float
    within: bool
    """|gap| is at most 0.2% of the metric, or two standard errors of the differences."""
    kept: Literal["in FP8", "without FP8"]
    """Which of the two the run goes on from."""


def is_due(train: Training) -> bool:
    probe, step = train.config.fp8.probe, train.step_done
    return train.config.fp8.recipe != "none" and probe.every > 0 and step % probe.every == 0


def probed_span(train: Training) -> Iterator[int]:
    """Step numbers of the span, twice; afterwards the run stands at the span's end."""
    probe, place = train.config.fp8.probe, train.run / "fp8_probe" / f"step-{train.step_done}"
    train.save()
    before = _Snapshot(train)
    real = train.metrics, train.samples
    if train.is_main:
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
    train.metrics, train.samples, train.diverted = Records(place / "metrics.jsonl"), Records(place / "samples.jsonl"), True
    with switched_off(train.all_models()):
        without = yield from _steps(train, probe.steps)
    beside = train.metrics, train.samples
    (train.metrics, train.samples), train.diverted = real, False
    after = _Snapshot(train) if probe.fallback else None
    before.restore(train)
    fp8 = yield from _steps(train, probe.steps)
    verdict = compare(without, fp8, probe.fallback)
    if after is not None and verdict.kept == "without FP8":
        if train.is_main:
            for records, diverted in zip(real, beside, strict=True):
                records.cut(before.step_done)
                for line in diverted.read():
                    records.append_once(line.pop("step"), line)
        after.restore(train)
    if train.is_main:
        (place / "verdict.json").write_text(json.dumps(asdict(verdict), indent=2) + "\n")
    train.note(_described(verdict, before.step_done, train.step_done))
    train.save()


def compare(without: Sequence[dict[str, float]], fp8: Sequence[dict[str, float]], fallback: bool = False) -> SpanVerdict:
    """Two runs of the same steps, by the metric that tells most."""
    steps = list(zip(without, fp8, strict=False))
    found = {name: [(a[name], b[name]) for a, b in steps if name in a and name in b] for name in COMPARED}
    metric, pairs = next(((name, pairs) for name, pairs in found.items() if pairs), ("", []))
    if not pairs:
        raise CheckFailed(f"FP8 probe: no step of {len(steps)} had a finite {' or '.join(COMPARED)} with FP8 and without")
    differences = [b - a for a, b in pairs]
    gap, mean = statistics.fmean(differences), statistics.fmean(a for a, _ in pairs)
    error = statistics.stdev(differences) / math.sqrt(len(pairs)) if len(pairs) > 1 else 0.0
    within = abs(gap) <= max(RELATIVE * abs(mean), STANDARD_ERRORS * error)
    return SpanVerdict(metric, mean, mean + gap, gap, error, within, "without FP8" if fallback and not within else "in FP8")


def _described(verdict: SpanVerdict, first: int, last: int) -> str:
    outcome = "within bounds" if verdict.within else "TOO LARGE"
    return (
        f"FP8 probe of steps {first + 1} to {last}: {verdict.metric} {verdict.fp8:.4f}, without FP8 {verdict.without:.4f}, "
        f"gap {verdict.gap:+.1e} (standard error {verdict.standard_error:.1e}): {outcome}; goes on {verdict.kept}"
    )


def _steps(train: Training, count: int) -> Generator[int, None, list[dict[str, float]]]:
    """Returns the metrics of each step; a signal ends the run at the span's beginning, where the last checkpoint is."""
    reported: list[dict[str, float]] = []
    train.listeners.append(reported.append)
    for _ in range(count):
        if train.progress() >= 1:
            break
        yield from train.one_step()
        train.stop_if_asked()
    train.listeners.pop()
    return reported


class _Snapshot:
    """All that a training checkpoint holds, in the host's memory: a device that training fills has no room for it twice."""

    def __init__(self, train: Training) -> None:
        self.weights = {name: _on_host(p) for name, p in _trained(train)}
        self.optimizer = {name: _on_host(tensor) for name, tensor in optimizer_tensors(train.engine.optimizer).items()}
        self.fp8 = {name: _on_host(tensor) for name, tensor in fp8_state(train.all_models()).items()}
        self.others = {name: {n: _on_host(t) for n, t in w.named()} for name, w in train.weights.items()}
        self.states = {name: copy.deepcopy(value.state_dict()) for name, value in train.states.items()}
        self.step_done, self.tokens_done, self.result = train.step_done, train.tokens_done, copy.deepcopy(train.result)

    @torch.no_grad()
    def restore(self, train: Training) -> None:
        for name, parameter in _trained(train):
            parameter.copy_(self.weights[name])
        train.engine.optimizer.state.clear()
        restore_optimizer(train.engine.optimizer, self.optimizer)
        load_fp8_state(train.all_models(), self.fp8)
        for name, others in train.weights.items():
            others.restore({n: tensor.clone() for n, tensor in self.others[name].items()})
        for name, value in train.states.items():
            value.load_state_dict(copy.deepcopy(self.states[name]))
        train.step_done, train.tokens_done, train.result = self.step_done, self.tokens_done, copy.deepcopy(self.result)


def _on_host(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _trained(train: Training) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in train.policy.named_parameters() if p.requires_grad)
