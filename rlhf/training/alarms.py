"""What a run that samples says, and does, when its figures are an alarm (report/alarms.py has the rules).

    RUN/alarms.jsonl   each alarm that was said: step, name, words, and a reply

All ranks have the same figures, so they decide alike and nothing is exchanged. What was seen and said is part of a training
checkpoint. Figures of a span without FP8 that is only compared with are seen and not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.schema import PolicyStage
from rlhf.data.examples import PromptExample
from rlhf.errors import ConfigError
from rlhf.report.alarms import RULES, Bell, History, Signal, signals
from rlhf.rollout.credit import reply_kl
from rlhf.rollout.experience import Experience
from rlhf.rollout.ngrams import repeated
from rlhf.training.session import Training

SHOWN = 160
"""Characters of a prompt and of a reply."""
OF_EVALUATIONS = ("gold falls",)
OF_ITERATIONS = tuple(name for name in RULES if name not in OF_EVALUATIONS)


def _length(experience: Experience) -> Tensor:
    return experience.mask.sum(1)


def _kl(experience: Experience) -> Tensor:
    return reply_kl(experience) if experience.reference_logprobs is not None else _score(experience)


def _score(experience: Experience) -> Tensor:
    return experience.scores.masked_fill(~experience.scored, -torch.inf)


MOST: dict[str, Callable[[Experience], Tensor]] = {
    "KL budget": _kl,
    "replies do not end": _length,
    "replies end at once": lambda experience: -_length(experience),
    "length rewarded": _length,
    "repetition": lambda experience: torch.tensor([repeated(ids) for ids in experience.replies]),
}
"""Of which the reply that is shown has most; in other alarms, of the score."""


class AlarmWatch:
    """Made before the policy is prepared, which restores what it remembers."""

    def __init__(self, train: Training, config: PolicyStage, tokenizer: PreTrainedTokenizerBase) -> None:
        self.train, self.config, self.tokenizer, self.limits = train, config, tokenizer, config.alarms
        if config.kl.controller == "adaptive" and not self.limits.kl_budget:
            self.limits = self.limits.model_copy(update={"kl_budget": 2 * config.kl.target})
        self.history, self.bell = History(self.limits.window), Bell(self.limits.window)
        self.experience: Experience | None = None
        train.remember(alarms=self)

    def state_dict(self) -> dict[str, Any]:
        return {"history": asdict(self.history), "bell": asdict(self.bell)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        window = {"window": self.limits.window}  # as it is now: it may be changed when a run goes on
        self.history, self.bell = History(**state["history"] | window), Bell(**state["bell"] | window)

    def look(self, step: int, values: Mapping[str, float], experience: Experience, asked: Sequence[PromptExample]) -> None:
        """After an iteration. `values` are its metrics, the same on all ranks; `asked` are the prompts of the replies."""
        self.experience, self.asked = experience, asked
        warmed_up = (step + 1) / self.train.length >= self.config.schedule.warmup
        self.history.see(values, warmed_up)
        self._judge(step + 1, OF_ITERATIONS)

    def look_at_evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """After an evaluation of the weights after `step` iterations; one that was looked at before is left aside.

        Raises:
            ConfigError: no scorer gives the gold metric.
        """
        gold = self.limits.gold
        if gold is None:
            return
        if gold not in values and gold != self.history.gold:
            there = ", ".join(values)
            raise ConfigError(f"alarms.gold: no scorer of eval.scorers gives {gold}; what is measured is {there}")
        if not {"score", gold} <= values.keys():  # no reply has one this time
            return
        if self.history.see_evaluation(step, values["score"], gold, values[gold]) and step:
            self._judge(step, OF_EVALUATIONS)

    def _judge(self, step: int, among: Sequence[str]) -> None:
        if self.limits.action == "none" or self.train.diverted:
            return
        said = self.bell.rings(signals(self.history, self.limits, among), among)
        for name, signal in said.items():
            self._say(step, name, signal)
        if said and self.limits.action == "pause":
            told = "; ".join(f"{name}: {signal.words}" for name, signal in said.items())
            self.train.pause_for = (
                f"paused by an alarm in step {step}. {told}. All is saved: run the same command again to go on, which stops "
                "again where this gets worse, or never with --alarms.action note; another lr or kl.coef needs "
                "--allow-inexact-resume"
            )

    def _say(self, step: int, name: str, signal: Signal) -> None:
        train, words = self.train, signal.words
        if (score := self.history.change("reward/score")) is not None:
            words += f"; reward/score went from {score[0]:.3g} to {score[1]:.3g}"
        prompt, reply = self._example(name)
        train.note(f"ALARM {name} in step {step}: {words}; see `rlhf explain {name!r}`")
        if self.experience is not None:
            train.note(f"  a reply: {prompt!r} -> {reply!r}")
        if train.is_main:
            train.alarms.append_once(step, {"alarm": name, "words": words, "prompt": prompt, "reply": reply})

    def _example(self, name: str) -> tuple[str, str]:
        """The beginning of a prompt and of its reply; of a run that went on when only its last evaluation was left, of none."""
        if self.experience is None:
            return "", ""
        row = int(MOST.get(name, _score)(self.experience).argmax())
        reply = self.tokenizer.decode(self.experience.replies[row])
        return _cut(self.asked[row].text), _cut(str(reply))


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
