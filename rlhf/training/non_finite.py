"""What is not finite never reaches the optimizer: losses, gradient norms, and in PPO scores, KL, advantages and returns.

    RUN/non_finite/step-N.json   what was not finite in step N, on every rank, and the rows it came from

All ranks must decide alike, and nothing may wait for it while all is well. So a loss that is not finite is given a gradient
of NaN, which makes the one norm that all ranks know NaN too; only then do they tell each other whose loss it was. What PPO
looks at before its update is on every rank already. Source of the idea: torchtitan, which ends a run before the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.errors import CheckFailed
from rlhf.fp8.state import recorded_magnitudes, take_back_magnitudes
from rlhf.runs.manifest import write_json
from rlhf.training.accumulation import rank_of_rows

if TYPE_CHECKING:
    from rlhf.training.session import Training

DIRECTORY = "non_finite"
PLACES_SHOWN = 3
"""Rows named in a message; the file has all."""

Describe = Callable[[Any], Any]
"""An item of a batch -> what lets a person find it, as JSON."""


class NonFinite:
    """What a run does about it, and how often in a row it did; the latter is part of a training checkpoint."""

    def __init__(self, train: Training) -> None:
        self.train, self.config, self.in_a_row = train, train.config.non_finite, 0
        self.items: Sequence[Any] = ()

    def state_dict(self) -> dict[str, Any]:
        return {"in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.in_a_row = state["in_a_row"]

    def begin_step(self) -> None:
        self.steps_taken, self.refusals = 0, []
        self.losses: list[tuple[Sequence[Any], Tensor]] = []
        self.describe: Describe = described
        self.magnitudes = recorded_magnitudes(self.train.policy)

    def watched(self, loss: Tensor) -> Tensor:
        """The loss of the micro-batch of `items`; where it is not finite, with a gradient of NaN. Stays on the device."""
        self.losses.append((self.items, loss.detach()))
        return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan).to(loss.dtype)

    def accepts(self, norm: float) -> bool:
        """Whether a gradient of this norm may be stepped with; all ranks have the same norm.

        Raises:
            CheckFailed: it may not, and the run is to end.
        """
        losses, self.losses = self.losses, []
        if math.isfinite(norm):
            self.in_a_row, self.steps_taken = 0, self.steps_taken + 1
            self.magnitudes = recorded_magnitudes(self.train.policy)
            return True
        take_back_magnitudes(self.train.policy, self.magnitudes)
        values = [float(loss) for _, loss in losses]
        bad = [items for (items, _), value in zip(losses, values, strict=True) if not math.isfinite(value)]
        of_loss = any(self.train.gather(bool(bad)))
        rows = [self._described(item) for items in (bad if of_loss else [items for items, _ in losses]) for item in items]
        own = {"rank": self.train.rank, "values": values if of_loss else [norm], "rows": rows}
        self._refuse("loss" if of_loss else "gradient norm", self.train.gather(own))
        return False

    def _described(self, item: Any) -> Any:
        """A row of an iteration is told by its index, any other (of PTX) by itself."""
        return self.describe(item) if isinstance(item, int) else described(item)

    def allows(self, quantities: Mapping[str, Tensor], describe: Describe, minibatch_size: int) -> bool:
        """Whether all that an iteration of PPO learns from is finite; the first quantity that is not is the one that is named.

        Args:
            quantities: name -> (B,) or (B, T), the same on all ranks.
            describe: of a row's index; also for losses, until the step ends.
            minibatch_size: rows among which the ranks divided the scoring.

        Raises:
            CheckFailed: it is not, and the run is to end.
        """
        self.describe = describe
        rank_of = rank_of_rows(len(next(iter(quantities.values()))), minibatch_size, self.train.world_size)
        for name, values in quantities.items():
            bad = ~values.isfinite().view(len(values), -1)
            if not bad.any():
                continue
            rows = bad.any(1).nonzero().flatten().tolist()
            first = {row: float(values[row].flatten()[bad[row]][0]) for row in rows}
            parts = [
                {"rank": rank, "values": [first[row] for row in own], "rows": [describe(row) for row in own]}
                for rank in range(self.train.world_size)
                for own in [[row for row in rows if rank_of[row] == rank]]
            ]
            self._refuse(name, parts)
            return False
        return True

    def evaluated(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """Of the values of an evaluation those that are finite, after saying which are not.

        Raises:
            CheckFailed: one is not, and the run is to end.
        """
        kept = finite_only(values)
        if bad := {name: value for name, value in values.items() if name not in kept}:
            what = f"evaluation after step {step}: " + ", ".join(f"{name} is {value}" for name, value in bad.items())
            if self.config.action == "abort":
                raise CheckFailed(f"{what}; the last checkpoint is as it was; to leave that out: --non_finite.action skip")
            self.train.note(f"{what}; left out")
        return kept

    def _refuse(self, quantity: str, parts: list[dict[str, Any]]) -> None:
        """Writes down what all ranks had, and ends the run or says that it goes on."""
        train, limit = self.train, self.config.max_consecutive
        self.in_a_row += 1
        goes_on = self.config.action == "skip" and self.in_a_row <= limit
        self.refusals.append({"quantity": quantity, "action": "skip" if goes_on else "abort", "ranks": parts})
        step, file = train.step_done + 1, train.run / DIRECTORY / f"step-{train.step_done + 1}.json"
        if train.is_main:
            file.parent.mkdir(exist_ok=True)
            write_json(file, _spelled({"step": step, "refusals": self.refusals}))
        train.gather(None)  # a rank that ends takes the others with it
        what = f"step {step}: {_in_words(quantity, parts)}; the rows are in {file}"
        if goes_on:
            train.stats.put({"optimizer/skipped": float(len(self.refusals))})
            train.note(f"{what}; skipped, {self.in_a_row} in a row ({limit} are allowed)")
            return
        way_out = "mend the cause, or go on without such rows: --non_finite.action skip"
        if self.config.action == "skip":
            way_out = f"{self.in_a_row} in a row, non_finite.max_consecutive is {limit}: mend the cause"
        raise CheckFailed(f"{what}; no step was taken with it, and the last checkpoint is as it was; {way_out}")


def described(item: Any) -> Any:
    """An example of a data file, or a pack of them."""
    return [described(one) for one in item] if isinstance(item, list) else asdict(item)


def finite_only(values: Mapping[str, float]) -> dict[str, float]:
    """Without what is not: JSON has no word for it."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _in_words(quantity: str, parts: Sequence[Mapping[str, Any]]) -> str:
    concerned = [part for part in parts if not all(map(math.isfinite, part["values"]))]
    value = next(value for part in concerned for value in part["values"] if not math.isfinite(value))
    places = [place for part in concerned for row in part["rows"] for place in _places(row)]
    shown = ", ".join(places[:PLACES_SHOWN]) + (f" and {more} more" if (more := len(places) - PLACES_SHOWN) > 0 else "")
    ranks = " and ".join(str(part["rank"]) for part in concerned)
    return f"{quantity} is {value} on rank {ranks} ({shown})"


def _places(row: Any) -> list[str]:
    return [place for one in row for place in _places(one)] if isinstance(row, list) else [row["where"]]


def _spelled(value: Any) -> Any:
    """NaN and infinities as strings."""
    if isinstance(value, dict):
        return {key: _spelled(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_spelled(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
