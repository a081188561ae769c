"""Steps 1 and 2 of an iteration, shared out: each rank samples and scores its part, and all get the whole (it is small).

Two passes, since a stage may choose among scored replies before any policy is asked what it thinks of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from rlhf.config.schema import PolicyStage
from rlhf.data.examples import PromptExample
from rlhf.data.order import row_seeds
from rlhf.models.roles import Roles
from rlhf.rollout.engines import Engine, Samples
from rlhf.rollout.evaluate import evaluate
from rlhf.rollout.experience import Experience, concatenate
from rlhf.rollout.readers import Reader
from rlhf.rollout.rewards import CombinedReward
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.scoring import Scored, join, score
from rlhf.training.accumulation import MicroBatch, scoring_micro_batches
from rlhf.training.session import Training

Part = TypeVar("Part")


@dataclass(frozen=True)
class Collection:
    train: Training
    config: PolicyStage
    roles: Roles
    policy: nn.Module
    """As the engine made it: `roles.policy` is inside."""
    engine: Engine
    reward: CombinedReward
    minibatch_size: int
    """Replies: a row goes to the rank and into the micro-batch in which the first epoch takes it."""
    scorers: Sequence[Reader] = ()
    held_out: Sequence[PromptExample] = ()

    def __call__(self, asked: Sequence[PromptExample], seeds: Sequence[int], sampling: Sampling) -> Experience:
        """A reply to each prompt, scored, with what the policies think of it."""
        return self.experience(self.replies(asked, seeds, sampling), sampling)

    def replies(
        self, asked: Sequence[PromptExample], seeds: Sequence[int], sampling: Sampling, known: Samples | None = None
    ) -> Scored:
        """A reply to each prompt, sampled or `known` already, in the order given, and its score."""
        train, mine = self.train, self._rows_here(len(asked))
        drawn = mine or [0]  # fewer replies than ranks: a stand-in keeps this rank in step, and is dropped below
        with train.phase("rollout"):
            if known is None:
                prompts, own_seeds = [asked[row].ids for row in drawn], [seeds[row] for row in drawn]
                samples = self.engine.generate(prompts, sampling, own_seeds)
            else:
                samples = known.rows(drawn)
        with train.phase("score"):
            scored = Scored(samples, self.reward(samples, [asked[row] for row in drawn]))
        return join(*self._of_all(mine, scored))

    def experience(self, scored: Scored, sampling: Sampling) -> Experience:
        """What the policies think of every token, row by row in the micro-batches of the first epoch."""
        mine = self._rows_here(len(scored))
        drawn = mine or [0]
        local = {row: index for index, row in enumerate(drawn)}
        places = [MicroBatch([local.get(row, 0) for row in micro.items], micro.weight) for micro in self._micros(len(scored))]
        temperature = sampling.temperature or 1.0  # greedy evaluation is scored as the policy itself
        with self.train.phase("score"):
            roles = self.roles
            own = score(scored.rows(drawn), places, self.policy, roles.has_critic, roles.reference, temperature, roles.pad_id)
        return concatenate(*self._of_all(mine, own))

    def evaluation(self, step: int) -> dict[str, float]:
        """Records how the policy does on the held-out prompts after `step` iterations."""
        train, config = self.train, self.config
        asked = list(self.held_out) * config.eval.samples_per_prompt
        sampling = Sampling(config.rollout.max_new_tokens, config.eval.temperature)
        experience = self(asked, row_seeds(train.seed("evaluation"), [prompt.index for prompt in asked]), sampling)
        metrics, samples = evaluate(experience, asked, self.scorers, self.roles.tokenizer, config.report.samples)
        recorded = train.record_evaluation(step, {f"eval/{name}": value for name, value in metrics.items()}, samples)
        return {name.removeprefix("eval/"): value for name, value in recorded.items()}

    def _micros(self, count: int) -> list[MicroBatch]:
        sizes = count, self.minibatch_size, self.config.micro_batch_size
        return scoring_micro_batches(*sizes, self.train.rank, self.train.world_size)

    def _rows_here(self, count: int) -> list[int]:
        return [row for micro in self._micros(count) if micro.weight for row in micro.items]

    def _of_all(self, rows: list[int], own: Part) -> tuple[list[Part], list[int]]:
        """The parts of all ranks that have rows, and the places of their rows in the whole."""
        parts = [part for part in self.train.gather((rows, own)) if part[0]]
        return [part for _, part in parts], [row for rows, _ in parts for row in rows]
