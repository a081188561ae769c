"""A policy's replies to fixed prompts, and what they score.

Models are opened one after the other, so that no two policies are in memory at once. Both of a comparison are given the same
prompts and the same random numbers.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.config.rewards import Scoring
from rlhf.data.collate import reply_row
from rlhf.data.examples import PromptExample, prompt_examples
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.models.load import configured_positions, load_tokenizer
from rlhf.models.precision import computing_in, precisions
from rlhf.models.roles import RewardModel, Roles, open_policy, open_reward_model, positions, require_positions
from rlhf.models.tokenizers import other_part, own_template, require_same_tokenizer
from rlhf.report.console import Console, Count
from rlhf.rollout.engines import Samples
from rlhf.rollout.readers import AT_ONCE, Reader, columns_asked, require_answers
from rlhf.rollout.rewards import Scores, open_reward, require_counted, require_finite_scores
from rlhf.rollout.sampling import Sampling
from rlhf.training.evaluation.rows import file_of, reply_logprobs, require_finite, say
from rlhf.training.inference import counting, load_actor


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
    config: EvalConfig, spec: str, readers: Mapping[str, Reader], console: Console, referenced: bool = False
) -> Answered:
    """What a policy replies; `readers` ask for columns of the prompts.

    Args:
        referenced: its KL from config.reference will be asked for.
    """
    policy = load_actor(spec, template=config.data.template, trust_remote_code=config.trust_remote_code)
    roles = policy.roles
    data = config.data if "extra_columns" in config.data.model_fields_set else config.data.model_copy(update=KEEP)
    columns = columns_asked(config.reward, readers.values()) if config.reward.model_fields_set else {}
    found = prompt_examples(file_of(config), data, policy.template, columns)
    say(console, found.notes)
    prompts = found.items
    require_answers(readers.values(), prompts)
    if config.reward.model_fields_set:
        require_counted(config.reward, roles.tokenizer)
    longest = max(map(len, prompts)) + config.max_new_tokens
    roles.check_context(longest, LOWER)
    if referenced and config.reference:
        there = configured_positions(config.reference, config.trust_remote_code)
        require_positions(there, longest, LOWER, f"the reference {config.reference}")
    console.note(f"{spec}: replies to {len(prompts)} prompts")
    (precision,) = precisions(config)
    samples, texts = policy.draw(
        [prompt.ids for prompt in prompts],
        [prompt.index for prompt in prompts],
        config.seed,
        Sampling(config.max_new_tokens, config.temperature),
        precision,
        config.batch_size,
        note=console.note,
        told=counting(console, len(prompts), roles, config.max_new_tokens),
    )
    logprobs = _logprobs(config, spec, roles, samples, console) if referenced else None
    return Answered(prompts, samples, texts, policy.template, logprobs)


KEEP = {"extra_columns": "ignore"}
"""As `rlhf generate` has it: prompts may come with answers."""

LOWER = "data.max_length or max_new_tokens"


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
    lengths = (len(prompt) + len(reply) for prompt, reply in zip(own.samples.prompts, own.samples.responses, strict=True))
    roles.check_context(max(lengths), LOWER, f"the reference {config.reference}")  # of an adapter not known before
    return own.logprobs - _logprobs(config, config.reference, roles, own.samples, console)


def _logprobs(config: EvalConfig, spec: str, roles: Roles, samples: Samples, console: Console) -> Tensor:
    rows = [[reply_row(prompt, reply)] for prompt, reply in zip(samples.prompts, samples.responses, strict=True)]
    (precision,) = precisions(config)
    with computing_in(precision, roles, samples.prompts, config.batch_size):
        found = reply_logprobs(roles, rows, config.batch_size, console, "replies", config.temperature)
    return require_finite(found, spec)


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
        how = {"told": count.add, "advice": f"lower {LOWER}"}
        reward = open_reward(config.reward, readers, models, own.template, config.batch_size, **how)
        parts = []
        for rows in chunks(range(len(own.prompts)), AT_ONCE):  # a call of a function or a service has a deadline
            parts.append(reward(own.samples.rows(rows), [own.prompts[row] for row in rows]))
            count.add(0 if models else len(rows))
        scores = Scores.joined(parts)
        require_finite_scores(scores, own.prompts)
        found.append(replace(scores, scores=config.reward.weight * scores.scores.double()))
    return found


def counted_scores(reward: Scoring, models: Mapping[str, RewardModel], replies: int, console: Console) -> Count:
    """What models are asked: of a reply, and of its row's answer where that is taken off. Without a model, replies."""
    return console.count(replies * (sum(1 + reward.parts[name].minus_answer for name in models) or 1), "scores")


def _reading(spec: str, roles: Roles, own: Answered, console: Console) -> RewardModel:
    """The policy's tokens where the tokenizer is the same, as in PPO; else its texts."""
    model = RewardModel(roles.policy, "critic", positions(roles.policy))
    if other := other_part(own.template.tokenizer, roles.tokenizer):
        console.note(f"the {other} of the reward model {spec} is not the policy's: it reads replies as text")
        model.template = own_template(spec, roles.tokenizer)
    return model
