"""What a reference thinks of replies that do not change: computed once, before the first step.

Each reply is scored in the micro-batch in which the policy first sees it: where the reference is the policy as it starts, their
log-ratio is then exactly 0 in the first step. The numbers are part of every checkpoint, since a run that goes on has no policy
as it started any more.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf.data.collate import reply_batch
from rlhf.data.examples import PairExample, RatedExample
from rlhf.digest import text_digest
from rlhf.errors import DataError
from rlhf.functional.logprobs import reply_sums
from rlhf.training.invariants import COMPILED_TOLERANCE, Checks
from rlhf.training.session import Training

Replies = TypeVar("Replies", PairExample, RatedExample)


def reply_logprobs(policy: nn.Module, examples: Sequence[Replies], device: torch.device) -> Tensor:
    """(examples, replies of each): log p of whole replies."""
    logprobs = policy(reply_batch(examples).to(device), roles=("actor",)).logprobs
    lengths = [len(reply) for example in examples for reply in example.replies]
    return reply_sums(logprobs, lengths).view(len(examples), -1)


def log_ratios(logprobs: Tensor, examples: Sequence[Replies]) -> Tensor:
    """log pi - log pi_ref, of the shape of `logprobs`."""
    return logprobs - torch.tensor([example.reference for example in examples], dtype=logprobs.dtype, device=logprobs.device)


class ReferenceLogprobs:
    """By name of the rows: log-probabilities of their replies. Made before `train.prepare`, which restores them.

    Args:
        size: rows in a micro-batch.
    """

    def __init__(self, train: Training, size: int) -> None:
        self.train, self.size = train, size
        self.known: dict[str, dict[str, Any]] = {}
        train.remember(reference=self)

    def state_dict(self) -> dict[str, Any]:
        return self.known

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known = state

    def beside(
        self, name: str, rows: Sequence[Replies], batches: Sequence[Sequence[int]], reference: nn.Module
    ) -> list[Replies]:
        """The rows, each with its `reference`.

        Args:
            batches: indices of the rows, in the global batches in which the policy sees them; the others stay without.

        Raises:
            DataError: a checkpoint has those of other rows.
        """
        if not rows:
            return []
        wanted = sorted({row for batch in batches for row in batch})
        digest = text_digest("".join(text_digest(f"{row} {rows[row].prompt} {rows[row].replies}") for row in wanted))
        if name not in self.known:
            self.known[name] = {"digest": digest, "logprobs": self._computed(rows, wanted, batches, reference)}
        if self.known[name]["digest"] != digest:
            raise DataError(
                f"{self.train.run}: its checkpoint has reference log-probabilities of other {name} rows, and the policy that "
                "could give those of these is gone; choose another --output"
            )
        found = dict(zip(wanted, self.known[name]["logprobs"], strict=True))
        return [replace(example, reference=tuple(found.get(row, ()))) for row, example in enumerate(rows)]

    def _computed(
        self, rows: Sequence[Replies], wanted: list[int], batches: Sequence[Sequence[int]], reference: nn.Module
    ) -> list[list[float]]:
        train, start = self.train, time.monotonic()
        own: dict[int, tuple[int, list[float]]] = {}
        with train.evaluating():
            for number, batch in enumerate(batches):
                train.stop_if_asked()
                for micro in train.accumulate(batch, self.size):
                    logprobs = reply_logprobs(reference, [rows[row] for row in micro.items], train.device).tolist()
                    if micro.weight:
                        own = {row: (number, values) for row, values in zip(micro.items, logprobs, strict=True)} | own
        found = [(row, asked) for part in train.gather(own) for row, asked in part.items()]
        every = {row: values for row, (_, values) in sorted(found, key=lambda each: -each[1][0])}  # the first batch last
        train.note(f"reference log-probabilities of {len(wanted)} rows in {time.monotonic() - start:.1f} s")
        return [every[row] for row in wanted]


def require_equal_start(train: Training, batch: Sequence[int]) -> None:
    """Raises CheckFailed where the policy of the first step, on this batch, is not the reference that it was before it.

    A batch that has a row twice is not looked at, as that row has one reference and may be in two micro-batches; nor is a span
    without FP8, as the reference was computed with it.
    """
    if train.diverted or len(set(batch)) < len(batch):
        return
    drift, checks = train.reduce(train.stats)["drift"], Checks()
    if not math.isfinite(drift):
        return  # the loss is not either, and what becomes of that is settled in one place
    within, words = (COMPILED_TOLERANCE, f"within {COMPILED_TOLERANCE}") if train.config.compile else (0.0, "exactly 0")
    checks.expect("drift at step 0", drift <= within, drift, f"the policy starts as the reference: |log ratio| is {words}")
    checks.require(train.note)
