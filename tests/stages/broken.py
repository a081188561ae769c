"""Stages that are broken on purpose: numbers that are not finite, at a step, on a rank, in a place."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from types import ModuleType

import torch

from rlhf.training import collection
from rlhf.training.session import Training


class Fault:
    """Breaks a stage at some of its steps (which count from 0), on one rank. The harness calls it with the stage's module."""

    def __init__(self, break_: Callable[[ModuleType, Fault], None], steps: Sequence[int], rank: int = 0) -> None:
        self.break_, self.steps, self.rank, self.step, self.calls = break_, steps, rank, -1, 0

    def __call__(self, module: ModuleType) -> None:
        plain = Training.one_step

        def one_step(train):
            for step in plain(train):
                self.step, self.calls = step, 0
                yield step

        Training.one_step = one_step  # type: ignore[method-assign]
        self.break_(module, self)

    def is_now(self) -> bool:
        return self.step in self.steps and int(os.environ.get("RANK", "0")) == self.rank


LOSSES = {"sft": "sft_loss", "rm": "bradley_terry_loss", "ppo": "ppo_loss"}


def in_loss(change: Callable[[torch.Tensor], torch.Tensor]):
    """In the first micro-batch of the step; in PPO in the second, which here is the second minibatch."""

    def break_(module: ModuleType, fault: Fault) -> None:
        name = next(name for name in LOSSES.values() if hasattr(module, name))
        plain = getattr(module, name)

        def broken(*arguments, **named):
            found = plain(*arguments, **named)
            loss = found[0] if isinstance(found, tuple) else found
            fault.calls += loss.requires_grad
            if not fault.is_now() or not loss.requires_grad or fault.calls != (2 if name == "ppo_loss" else 1):
                return found
            return (change(loss), *found[1:]) if isinstance(found, tuple) else change(loss)

        setattr(module, name, broken)

    return break_


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The loss itself stays as it is."""
    loss = loss * 1.0
    loss.register_hook(lambda gradient: gradient * math.inf)
    return loss


def in_score(module: ModuleType, fault: Fault) -> None:
    plain = module.open_reward

    def open_reward(*arguments):
        reward = plain(*arguments)

        def broken(*of):
            found = reward(*of)
            if fault.is_now():
                found.scores[1] = math.nan
            return found

        return broken

    module.open_reward = open_reward


def in_kl(module: ModuleType, fault: Fault) -> None:
    plain = collection.score

    def score(*arguments):
        found = plain(*arguments)
        if fault.is_now():
            found.reference_logprobs[1, 0] = -math.inf
        return found

    collection.score = score  # in the fork


def logprobs_shifted_by(nats: float) -> Callable[[ModuleType], None]:
    """Sampling and scoring disagree."""

    def change(_: ModuleType) -> None:
        right = collection.score

        def wrong(*arguments):
            found = right(*arguments)
            found.logprobs.add_(nats)
            return found

        collection.score = wrong  # in the fork

    return change


def in_advantage(module: ModuleType, fault: Fault) -> None:
    plain = module.credit

    def credit(*arguments):
        found, stats = plain(*arguments)
        if fault.step in fault.steps:  # every rank has all of it
            advantages = found.advantages.clone()
            advantages[fault.rank, 0] = math.inf  # rank r has row r of a minibatch
            found = replace(found, advantages=advantages)
        return found, stats

    module.credit = credit
