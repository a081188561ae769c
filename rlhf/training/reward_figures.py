"""How good a reward model is on held-out rows: one set of figures for `rlhf rm` and for `rlhf eval`.

A prompt counts once, however many replies to it are compared: the pairs of one prompt say much the same. Left out: how the
figures are written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.data.collate import comparisons, last_row, ranking_batch, token_batch
from rlhf.data.examples import RankedExample
from rlhf.errors import DataError
from rlhf.functional.masked import Moments
from rlhf.functional.preference import (
    accuracy,
    bradley_terry_loss,
    calibration_error,
    correlation,
    reliability,
    wilson_interval,
)
from rlhf.functional.rewards import gain_bias
from rlhf.training.accumulation import MicroBatch

if TYPE_CHECKING:
    from rlhf.training.session import Training

ALONE = 8
"""Prompts whose replies are scored a second time, one by one."""

Gather = Callable[[dict[int, Tensor]], list[dict[int, Tensor]]]


def by_length(examples: Sequence[RankedExample]) -> list[int]:
    """Places of the examples; rows of like length share a forward pass."""
    return sorted(range(len(examples)), key=lambda place: len(examples[place]))


def score_all(
    policy: Callable[..., Any],
    examples: Sequence[RankedExample],
    micro_batches: Iterable[MicroBatch],
    device: torch.device,
    gather: Gather = lambda scores: [scores],
) -> Tensor:
    """(R,) in float64: of every reply, example by example, on every rank.

    Args:
        micro_batches: of places of examples, those of this rank.
        gather: gives what every rank has.
    """
    own: dict[int, Tensor] = {}
    for micro in micro_batches:
        part = [examples[place] for place in micro.items]
        scores = policy(ranking_batch(part).to(device), roles=("critic",)).values.double().cpu()
        if micro.weight:
            own |= dict(zip(micro.items, scores.split([len(example.replies) for example in part]), strict=True))
    found = {place: scores for part in gather(own) for place, scores in part.items()}
    return torch.cat([found[place] for place in range(len(examples))])


def score_alone(policy: Callable[..., Any], examples: Sequence[RankedExample], device: torch.device) -> Tensor:
    """Scores of some examples' replies once more, each the only row of its batch."""
    rows = [last_row(example.prompt, reply) for example in examples[:ALONE] for reply in example.replies]
    return torch.cat([policy(token_batch([row]).to(device), roles=("critic",)).values.double().cpu() for row in rows])


def require_decided(examples: Sequence[RankedExample], path: str) -> None:
    """Raises DataError where nothing is left that a model could be right about."""
    if all(comparison.tie for example in examples for comparison in example.comparisons):
        raise DataError(f"{path}: every pair is a tie, so there is no accuracy to measure; expected rows with a better reply")


def counted(examples: Sequence[RankedExample]) -> dict[str, float]:
    """How many pairs there are, and how often the longer reply (in tokens) is the better one: what length alone would get."""
    pairs = comparisons(examples, like=torch.empty(0, dtype=torch.float64))
    lengths = lengths_of(examples)
    longer = accuracy(lengths[pairs.better], lengths[pairs.worse])
    return {"pairs": len(pairs.better), "longer_wins": _mean(longer, pairs.decided)}


def figures(examples: Sequence[RankedExample], scores: Tensor, alone: Tensor) -> dict[str, float]:
    """What `score_all` and `score_alone` come to. Ties count in `loss` alone, accuracy's interval is Wilson's, 95%."""
    pairs, lengths = comparisons(examples, like=scores), lengths_of(examples)
    chosen, rejected = scores[pairs.better], scores[pairs.worse]
    right, longer_by = accuracy(chosen, rejected), lengths[pairs.better] - lengths[pairs.worse]
    prompts = round(float(pairs.decided.sum()))
    low, high = wilson_interval(float((pairs.decided * right).sum()), prompts)
    found = {
        "accuracy": _mean(right, pairs.decided),
        "accuracy_low": low,
        "accuracy_high": high,
        "loss": _mean(bradley_terry_loss(chosen, rejected, target=pairs.target), pairs.weight),
        "margin": _mean(chosen - rejected, pairs.decided),
        "score": float(scores.mean()),
        "calibration_error": float(calibration_error(reliability(chosen - rejected, pairs.decided))),
        "length_correlation": float(correlation(scores, lengths)),
        "moved_alone": float((scores[: len(alone)] - alone).abs().max()),
    }
    for name, which in (("accuracy_of_shorter", longer_by < 0), ("accuracy_of_longer", longer_by > 0)):
        if (weight := pairs.decided * which).any():
            found[name] = _mean(right, weight)
    return found


Reliability = dict[str, dict[str, float]]
"""Bin, as `0.50 to 0.55` -> prompts, predicted, observed."""


def reliability_table(examples: Sequence[RankedExample], scores: Tensor) -> Reliability:
    """The bins of `reliability` that hold anything, in order."""
    pairs = comparisons(examples, like=scores)
    rows = reliability(scores[pairs.better] - scores[pairs.worse], pairs.decided).tolist()
    edges = [0.5 + 0.5 * number / len(rows) for number in range(len(rows) + 1)]
    return {
        f"{low:.2f} to {high:.2f}": {"prompts": weight, "predicted": predicted, "observed": observed}
        for low, high, (weight, predicted, observed) in zip(edges, edges[1:], rows, strict=False)
        if weight
    }


def in_words(found: dict[str, float]) -> list[str]:
    """`figures` and `counted`, a sentence each."""
    by_length = ", ".join(
        f"{found[name]:.3f} where the {what} reply is the better one"
        for name, what in (("accuracy_of_shorter", "shorter"), ("accuracy_of_longer", "longer"))
        if name in found
    )
    return [
        f"held-out accuracy {found['accuracy']:.3f} (95%: {found['accuracy_low']:.3f} to {found['accuracy_high']:.3f}, "
        f"{found['pairs']} pairs); taking the longer reply gets {found['longer_wins']:.3f}",
        f"scores and lengths correlate by {found['length_correlation']:+.2f}"
        + (f"; accuracy is {by_length}" if by_length else ""),
        f"how sure it is and how often it is right differ by {found['calibration_error']:.3f} in the mean; "
        f"alone in its batch a reply's score is another by {found['moved_alone']:.1e} at most",
    ]


def best(examples: Sequence[RankedExample]) -> Tensor:
    """(R,) whether a reply is one that none is better than."""
    return torch.tensor([rank == min(example.ranks) for example in examples for rank in example.ranks])


@dataclass(frozen=True)
class Scale:
    """gain * score + bias has mean 0 and deviation 1 on some replies (Ziegler et al. 2019, arXiv:1909.08593)."""

    gain: float
    bias: float
    before: Moments
    after: Moments

    @classmethod
    def of(cls, scores: Tensor) -> Scale:
        gain, bias = gain_bias(scores)
        return cls(gain, bias, Moments.of(scores), Moments.of(gain * scores + bias))

    def figures(self) -> dict[str, float]:
        moments = {"mean_before": self.before.mean, "std_before": self.before.std}
        moments |= {"mean_after": self.after.mean, "std_after": self.after.std}
        return {f"normalize/{name}": value for name, value in {"gain": self.gain, "bias": self.bias, **moments}.items()}

    def in_words(self) -> str:
        return (
            f"scores of {self.before.count:.0f} replies: mean {self.before.mean:.4g}, deviation {self.before.std:.4g}; with "
            f"gain {self.gain:.4g} and bias {self.bias:.4g} mean {self.after.mean:.1e}, deviation {self.after.std:.4f}. "
            "Other figures are of scores before that"
        )


def lengths_of(examples: Sequence[RankedExample]) -> Tensor:
    """(R,) tokens of every reply."""
    return torch.tensor([len(reply) for example in examples for reply in example.replies], dtype=torch.float64)


def _mean(values: Tensor, weight: Tensor) -> float:
    return float((weight * values).sum() / weight.sum())


def record_accuracy(train: Training, step: int, values: dict[str, float], count: int, what: str) -> dict[str, float]:
    """Records an evaluation of implicit rewards, on `count` pairs or replies, and says how often they are right, with Wilson's
    95% interval."""
    accuracy = values["eval/accuracy"]
    low, high = wilson_interval(accuracy * count, count)
    recorded = train.record_evaluation(
        step, values | {"eval/accuracy_low": low, "eval/accuracy_high": high, f"eval/{what}": count}
    )
    train.note(f"held-out accuracy {accuracy:.3f} (95%: {low:.3f} to {high:.3f}, {count} {what})")
    return recorded
