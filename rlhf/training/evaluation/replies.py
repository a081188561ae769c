"""A policy's replies to fixed prompts, and what they score.

Models are opened one after the other, so that no two policies are in memory at once. Both of a comparison are given the same
prompts and the same random numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.config.rewards import Scoring
from rlhf.data.collate import reply_row, token_batch
from rlhf.data.examples import PromptExample, prompt_examples
from rlhf.data.order import chunks, row_seeds
from rlhf.data.templates import Template
from rlhf.models.load import load_tokenizer
from rlhf.models.precision import computing_in, precisions
from rlhf.models.roles import RewardModel, Roles, open_policy, open_reward_model, positions
from rlhf.models.tokenizers import other_part, own_template, require_same_tokenizer
from rlhf.report.console import Console, Count
from rlhf.rollout.engines import NativeEngine, Samples
from rlhf.rollout.readers import AT_ONCE, Reader, columns_asked, require_answers
from rlhf.rollout.rewards import Scores, decode, open_reward, require_finite_scores
from rlhf.rollout.sampling import Sampling
from rlhf.training.evaluation.rows import file_of, say
from rlhf.training.inference import counting


@dataclass(frozen=True)
class Answered:
    """Prompts with a policy's replies."""

    prompts: list[PromptExample]
    samples: Samples
    texts: list[str]
    """Of the replies, without special tokens and white space around."""
    template: Template
    logprobs: Tensor | None
    """(B,) of whole replies at the sampling temperature, in float64, where they were asked for."""

    def only(self, indices: Collection[int]) -> Answered:
        """The replies to some prompts, by `PromptExample.index`."""
        rows = [row for row, prompt in enumerate(self.prompts) if prompt.index in indices]
        if len(rows) == len(self.prompts):
            return self
        prompts, texts = [self.prompts[row] for row in rows], [self.texts[row] for row in rows]
        logprobs = None if self.logprobs is None else self.logprobs[rows]
        return Answered(prompts, self.samples.rows(rows), texts, self.template, logprobs)


def answered(
    config: EvalConfig, spec: str, readers: Mapping[str, Reader], console: Console, with_logprobs: bool = False
) -> Answered:
    """What a policy replies; `readers` ask for columns of the prompts."""
    roles = open_policy(spec, config.trust_remote_code)
    template = Template(roles.tokenizer, config.data.template, roles.stop_ids)
    data = config.data if "extra_columns" in config.data.model_fields_set else config.data.model_copy(update=KEEP)
    columns = columns_asked(config.reward, readers.values()) if config.reward.model_fields_set else {}
    found = prompt_examples(file_of(config), data, template, columns)
    say(console, found.notes)
    prompts = found.items
    require_answers(readers.values(), prompts)
    roles.check_context(max(map(len, prompts)) + config.max_new_tokens, "data.max_length or max_new_tokens")
    console.note(f"{spec}: replies to {len(prompts)} prompts")
    ids, seeds = [prompt.ids for prompt in prompts], row_seeds(config.seed, [prompt.index for prompt in prompts])
    told = counting(console, len(prompts), roles, config.max_new_tokens)
    engine = NativeEngine(nullcontext, roles.stop_ids, roles.pad_id, config.batch_size, console.note, told=told)
    engine.sync(roles.policy, version=0)
    (precision,) = precisions(config)
    with computing_in(precision, roles, ids, config.batch_size) as in_fp8:
        say(console, [in_fp8] if in_fp8 else [])
        samples = engine.generate(ids, Sampling(config.max_new_tokens, config.temperature), seeds)
        logprobs = _logprobs(config, roles, samples, console) if with_logprobs else None
    return Answered(prompts, samples, decode(samples.responses, roles.tokenizer), template, logprobs)


KEEP = {"extra_columns": "ignore"}
"""As `rlhf generate` has it: prompts may come with answers."""


def require_reference(config: EvalConfig) -> None:
    """Raises DataError where the reference does not read the policy's tokens."""
    assert config.reference is not None
    tokenizer = load_tokenizer(config.model, config.trust_remote_code)
    require_same_tokenizer(config.model, tokenizer, "reference", config.reference, config.trust_remote_code)


def kl(config: EvalConfig, own: Answered, console: Console) -> Tensor:
    """(B,) log pi - log pi_ref of each reply, whose mean over replies that pi sampled is KL(pi || pi_ref), in nats."""
    assert config.reference is not None
    assert own.logprobs is not None
    roles = open_policy(config.reference, config.trust_remote_code)
    (precision,) = precisions(config)
    with computing_in(precision, roles, own.samples.prompts, config.batch_size):
        return own.logprobs - _logprobs(config, roles, own.samples, console)


def _logprobs(config: EvalConfig, roles: Roles, samples: Samples, console: Console) -> Tensor:
    rows = [reply_row(prompt, reply) for prompt, reply in zip(samples.prompts, samples.responses, strict=True)]
    found = []
    tokens = lambda part: sum(len(row.prompt) + len(row.reply) for row in part)  # noqa: E731
    for part in console.counted(chunks(rows, config.batch_size), len(rows), "replies", tokens):
        batch = token_batch(part).to(roles.device)
        of_tokens = roles.policy(batch, roles=("actor",), temperature=config.temperature).logprobs.double().cpu()
        found += [of_reply.sum() for of_reply in of_tokens.split([len(row.reply) for row in part])]
    return torch.stack(found)


def scored(config: EvalConfig, readers: Mapping[str, Reader], answers: Iterable[Answered], console: Console) -> list[Scores]:
    """Of every policy's replies: as the reward gives them, times its weight. A reward model computes in float32.

    Raises:
        CheckFailed: a score is no finite number.
    """
    opened = {name: open_reward_model(spec, config.trust_remote_code) for name, spec in config.reward.models.items()}
    found = []
    for own in answers:
        models = {name: _reading(config.reward.models[name], roles, own, console) for name, roles in opened.items()}
        count = counted_scores(config.reward, models, len(own.prompts), console)
        advice = "lower data.max_length or max_new_tokens"
        reward = open_reward(config.reward, readers, models, own.template, config.batch_size, told=count.add, advice=advice)
        parts = [  # a call of a function or a service has a deadline
            reward(own.samples.rows(rows), [own.prompts[row] for row in rows])
            for rows in chunks(range(len(own.prompts)), AT_ONCE)
        ]
        scores = Scores.joined(parts)
        require_finite_scores(scores, own.prompts)
        found.append(replace(scores, scores=config.reward.weight * scores.scores.double()))
    return found


def counted_scores(reward: Scoring, models: Mapping[str, RewardModel], replies: int, console: Console) -> Count:
    """Of models alone, which take long on this machine: each reads a reply, and its row's answer where that is taken off."""
    return console.count(replies * sum(1 + reward.parts[name].minus_answer for name in models), "scores")


def _reading(spec: str, roles: Roles, own: Answered, console: Console) -> RewardModel:
    """The policy's tokens where the tokenizer is the same, as in PPO; else its texts."""
    model = RewardModel(roles.policy, "critic", positions(roles.policy))
    if other := other_part(own.template.tokenizer, roles.tokenizer):
        console.note(f"the {other} of the reward model {spec} is not the policy's: it reads replies as text")
        model.template = own_template(spec, roles.tokenizer)
    return model
