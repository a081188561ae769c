"""Does training suffer from FP8? Short SFT runs with and without it: from the same weights, on the same batches.

A probe of N steps is a whole run of N steps under the config's schedule. A seed sets the order of the rows (and, from scratch,
the weights). Per seed the two runs are compared step by step; the band says how far runs without FP8 lie from one another, by
seed alone, so that a gap within it cannot be told from luck.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf.config.schema import SftConfig
from rlhf.data.examples import SftExample
from rlhf.data.order import Batches, seed_of
from rlhf.errors import DataError
from rlhf.fp8.apply import switched_off
from rlhf.fp8.state import advance, forget_weights
from rlhf.training.fp8.sft import Subject, open_subject, read_rows, with_fp8
from rlhf.training.optimization import open_optimizer, schedule_factor

RELATIVE = 2e-3
BANDS = 2.0
HELD_OUT_ROWS = 64


@dataclass(frozen=True)
class Trajectory:
    """One run."""

    losses: list[float]
    """Of each step's batch, before the step."""
    gradient: Tensor
    """Of the first batch, all weights in one."""
    with_fp8: Tensor
    without_fp8: Tensor
    """Log-probs of held-out tokens under the trained weights."""

    @property
    def late_loss(self) -> float:
        """Mean loss over the last half."""
        return statistics.fmean(self.losses[len(self.losses) // 2 :])


@dataclass(frozen=True)
class Verdict:
    """One recipe against the runs without FP8; means over seeds unless it says otherwise."""

    recipe: str
    gap: float
    """Signed difference of the mean losses over the last half, as a part of the loss without FP8."""
    gaps: list[float]
    """The same of each seed."""
    seed_band: float
    bound: float
    gradient_cosine: float
    """Of the first batch's gradient with and without FP8; the least of all seeds."""
    logprob_drift: float
    """Mean |log p with FP8 - log p without| of held-out tokens under the weights trained in FP8."""
    largest_logprob_drift: float
    ratio_drift: float
    """Mean exp |difference|: how far from 1 a PPO ratio would be if one side ran without FP8."""
    within: bool


def seed_band(plain: Sequence[Trajectory]) -> float:
    """Standard deviation, over seeds, of the mean loss over the last half of runs without FP8, as a part of its mean."""
    late = [one.late_loss for one in plain]
    return statistics.stdev(late) / statistics.fmean(late) if len(late) > 1 else 0.0


def probe(
    config: SftConfig, steps: int, seeds: int, recipes: Sequence[str], report: Callable[[str, int, float], None]
) -> list[Verdict]:
    """A verdict for each recipe.

    Args:
        report: is told (which run, which step, its loss) after every step.
    """
    for recipe in recipes:  # what cannot be had is said before the runs without FP8, not after
        open_subject(with_fp8(config, recipe=recipe))
    by_recipe: dict[str, list[Trajectory]] = {}
    for recipe in ("none", *recipes):
        for seed in range(config.seed, config.seed + seeds):
            chosen = with_fp8(config.model_copy(update={"seed": seed}), recipe=recipe)
            told = f"{recipe}, seed {seed}" if recipe != "none" else f"without FP8, seed {seed}"
            by_recipe.setdefault(recipe, []).append(_trained(chosen, steps, lambda *done, told=told: report(told, *done)))
    return [judged(recipe, by_recipe["none"], by_recipe[recipe]) for recipe in recipes]


def judged(recipe: str, plain: Sequence[Trajectory], fp8: Sequence[Trajectory]) -> Verdict:
    pairs = list(zip(plain, fp8, strict=True))
    gaps = [(ours.late_loss - theirs.late_loss) / theirs.late_loss for theirs, ours in pairs]
    gap, band = statistics.fmean(gaps), seed_band(plain)
    bound = max(RELATIVE, BANDS * band)
    drift = torch.cat([(one.with_fp8 - one.without_fp8).abs() for one in fp8])
    cosines = [float(torch.cosine_similarity(theirs.gradient, ours.gradient, 0)) for theirs, ours in pairs]
    return Verdict(
        recipe=recipe,
        gap=gap,
        gaps=gaps,
        seed_band=band,
        bound=bound,
        gradient_cosine=min(cosines),
        logprob_drift=float(drift.mean()),
        largest_logprob_drift=float(drift.max()),
        ratio_drift=float(drift.exp().mean()),
        within=abs(gap) <= bound,
    )


def _trained(config: SftConfig, steps: int, report: Callable[[int, float], None]) -> Trajectory:
    subject = open_subject(config)
    rows = read_rows(subject, config.data.train)
    rows, held_out = _held_out(subject, rows)
    schedule = config.schedule.model_copy(update={"unit": "steps", "length": steps})
    batches = Batches(len(rows), config.batch_size, seed_of(config.seed, "sft", "data"), schedule)
    optimizer = open_optimizer(subject.policy, config.optimizer)
    losses: list[float] = []
    gradient = torch.zeros(0)
    for step in range(steps):
        torch.manual_seed(seed_of(config.seed, "sft", "step", step, 0))  # LoRA dropout draws from it
        losses.append(subject.loss(subject.batches([rows[index] for index in batches[step]])))
        weights = [p for p in subject.policy.parameters() if p.grad is not None]
        if step == 0:
            gradient = torch.cat([p.grad.flatten().cpu() for p in weights])  # pyright: ignore
        torch.nn.utils.clip_grad_norm_(weights, config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * schedule_factor(schedule, step / steps, (step + 1) / steps)
        optimizer.step()
        forget_weights(subject.policy)  # a fused step writes them where no version of a tensor tells
        optimizer.zero_grad()
        advance(subject.policy)
        report(step, losses[-1])
    looked_at = subject.batches(held_out)
    subject.policy.eval()
    with switched_off(subject.policy):
        without = subject.logprobs(looked_at)
    return Trajectory(losses, gradient, subject.logprobs(looked_at).cpu(), without.cpu())


def _held_out(subject: Subject, rows: list[SftExample]) -> tuple[list[SftExample], list[SftExample]]:
    """(rows to train on, rows to look at): those of data.eval, or the file's last ones, which are then not trained on."""
    if path := subject.config.data.eval:
        return rows, read_rows(subject, path)[:HELD_OUT_ROWS]
    count = min(HELD_OUT_ROWS, max(1, len(rows) // 10))
    if len(rows) <= count:
        raise DataError(f"{subject.config.data.train}: one row to train on and none to look at; give more, or data.eval")
    return rows[:-count], rows[-count:]
