"""Steps 1 and 2 of an iteration, shared out: each rank samples and scores its part, and all get the whole (it is small).

Two passes, since a stage may choose among scored replies before any policy is asked what it thinks of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from rlhf.config.schema import PolicyStage
from rlhf.data.examples import PromptExample, prompt_examples
from rlhf.data.order import row_seeds
from rlhf.data.templates import Template
from rlhf.models.roles import Roles
from rlhf.rollout.engines import Engine, Samples
from rlhf.rollout.evaluate import evaluate
from rlhf.rollout.experience import Experience, concatenate
from rlhf.rollout.pair_check import judged_on_pairs, verdict_on_pairs
from rlhf.rollout.readers import Reader, columns_asked, require_answers
from rlhf.rollout.rewards import CombinedReward
from rlhf.rollout.sampling import Sampling
from rlhf.rollout.scoring import Scored, join, score
from rlhf.training.accumulation import MicroBatch, scoring_micro_batches
from rlhf.training.session import Training

Part = TypeVar("Part")


def read_prompts(
    train: Training, config: PolicyStage, roles: Roles, template: Template, readers: Sequence[Reader], scorers: Sequence[Reader]
) -> tuple[list[PromptExample], list[PromptExample]]:
    """(to train on, held out): with the columns that those who score them ask for."""

    def read(path: str, readers: Sequence[Reader]) -> list[PromptExample]:
        columns = columns_asked(config.reward, readers)
        prompts = train.read(path, prompt_examples(path, config.data, template, columns), "prompts")
        require_answers(readers, prompts)
        longest = max(map(len, prompts)) + config.rollout.max_new_tokens
        roles.check_context(longest, "data.max_length or rollout.max_new_tokens")
        return prompts

    data = config.data
    prompts = read(data.train, readers)
    return prompts, read(data.eval, [*readers, *scorers])[: data.eval_limit] if data.eval else []


def judge_reward(
    train: Training, config: PolicyStage, readers: Mapping[str, Reader], reward: CombinedReward, template: Template
) -> None:
    """Says, as a run begins, how often the reward prefers the better reply of `reward.pairs`, if there are any.

    Raises:
        CheckFailed: it prefers the worse ones.
    """
    if not (config.reward.pairs and config.reward.gate) or train.step_done:
        return
    columns = columns_asked(config.reward, readers.values())
    found = judged_on_pairs(config.reward, reward, template, columns, config.data.max_line_bytes)
    right, count = train.gather(found)[0]  # a function may tell each rank something else
    train.note(verdict_on_pairs(config.reward, right, count))


@dataclass(frozen=True)
class Collection:
    train: Training
    config: PolicyStage
    roles: Roles
    policy: nn.Module
    """As the engine made it: `roles.policy` is inside."""
    engine: Engine
    reward: CombinedReward
    scorers: Sequence[Reader] = ()
    held_out: Sequence[PromptExample] = ()

    def rows(self, asked: Sequence[PromptExample], *purpose: object) -> tuple[list[PromptExample], list[int]]:
        """Each prompt as often as it gets replies, side by side, and the seeds of these."""
        rows = [prompt for prompt in asked for _ in range(self.config.rollout.samples_per_prompt)]
        return rows, row_seeds(self.train.seed(*purpose), [prompt.index for prompt in rows])

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
        seeds = row_seeds(train.seed("evaluation"), [prompt.index for prompt in asked])
        experience = self.experience(self.replies(asked, seeds, sampling), sampling)
        metrics, samples = evaluate(experience, asked, self.scorers, self.roles.tokenizer, config.report.samples)
        recorded = train.record_evaluation(step, {f"eval/{name}": value for name, value in metrics.items()}, samples)
        return {name.removeprefix("eval/"): value for name, value in recorded.items()}

    def _micros(self, count: int) -> list[MicroBatch]:
        """A row goes to the rank and into the micro-batch in which the first epoch takes it."""
        sizes = count, self.config.update.minibatch_size, self.config.micro_batch_size
        return scoring_micro_batches(*sizes, self.train.rank, self.train.world_size)

    def _rows_here(self, count: int) -> list[int]:
        return [row for micro in self._micros(count) if micro.weight for row in micro.items]

    def _of_all(self, rows: list[int], own: Part) -> tuple[list[Part], list[int]]:
        """The parts of all ranks that have rows, and the places of their rows in the whole."""
        parts = [part for part in self.train.gather((rows, own)) if part[0]]
        return [part for _, part in parts], [row for rows, _ in parts for row in rows]
