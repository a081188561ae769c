"""A model on held-out rows: what is computed of each token or reply, and what the numbers come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.data.collate import Row, comparisons, reply_row, sft_batch, token_batch
from rlhf.data.examples import RankedExample, SftExample, ranked_examples, sft_examples
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.errors import CheckFailed, ConfigError
from rlhf.functional.logprobs import reply_sums
from rlhf.functional.preference import accuracy
from rlhf.models.precision import computing_in, precisions
from rlhf.models.roles import Roles, open_policy, open_reward_model
from rlhf.models.tokenizers import require_same_tokenizer
from rlhf.report.console import Console
from rlhf.training.accumulation import MicroBatch
from rlhf.training.evaluation.slices import slices
from rlhf.training.reward_figures import (
    ALONE,
    counted,
    figures,
    reliability_table,
    require_decided,
    score_all,
    score_alone,
)

POLICY, REWARD_MODEL, IMPLICIT = "policy", "reward model", "policy with its implicit reward"

Totals = dict[str, tuple[float, float]]
"""Row, as file:line -> (sum, count) of what a mean over rows is taken of."""


@dataclass(frozen=True)
class Subject:
    """Rows, and what is asked of a model about them. `measure` computes one number a token (log-probability) or a reply
    (score), always in the same order, and `figures` says what they come to."""

    kind: str
    counts: dict[str, Any]
    ids: list[list[int]]
    measure: Callable[[Roles], Tensor]
    figures: Callable[[Tensor], dict[str, float]]
    totals: Callable[[Tensor], Totals]
    """Of each row: a policy's loss and tokens, a reward model's right prompts and prompts."""
    details: Callable[[Tensor], dict[str, Any]] = lambda _: {}
    """More than figures, by name: tables of their own."""


def policy_rows(config: EvalConfig, console: Console) -> tuple[Roles, Subject]:
    roles = open_policy(config.model, config.trust_remote_code)
    console.note(f"{config.model}: a policy, evaluated on chats, prompts with completions, or text")
    if config.slice:
        raise ConfigError(f"slice: is of pairs; {config.model} is a policy: give the reference of its implicit rewards, too")
    found = sft_examples(file_of(config), config.data, Template(roles.tokenizer, config.data.template, roles.stop_ids))
    say(console, found.notes)
    rows = sorted(found.items, key=len)  # rows of like length share a forward pass
    roles.check_context(len(rows[-1]), "data.max_length")
    tokens = [sum(row.trained[1:]) for row in rows]

    def totals(logprobs: Tensor) -> Totals:
        """A document that was split is one row."""
        found: Totals = {}
        for row, count, part in zip(rows, tokens, logprobs.split(tokens), strict=True):
            total, before = found.get(row.where, (0.0, 0.0))
            found[row.where] = (total - float(part.sum()), before + count)
        return found

    counts = {"rows": len(rows), "tokens": sum(tokens)}
    measure = lambda roles: logprobs(roles, rows, config.batch_size, console)  # noqa: E731
    return roles, Subject(POLICY, counts, [row.ids for row in rows], measure, policy_figures, totals)


def logprobs(roles: Roles, rows: Sequence[SftExample], batch_size: int, console: Console) -> Tensor:
    """(tokens,) in float64: of every trained token, but for the first of a row, which nothing predicts."""
    parts = console.counted(chunks(rows, batch_size), len(rows), "rows", tokens_of)
    batches = (sft_batch(part).to(roles.device) for part in parts)
    return torch.cat([roles.policy(batch, roles=("actor",)).logprobs.double().cpu() for batch in batches])


def tokens_of(examples: Sequence[SftExample | RankedExample]) -> int:
    """A prompt counts once, however many replies it has."""
    return sum(
        len(example) if isinstance(example, SftExample) else len(example.prompt) + sum(map(len, example.replies))
        for example in examples
    )


def policy_figures(logprobs: Tensor) -> dict[str, float]:
    loss = -logprobs.mean()
    return {"loss": float(loss), "perplexity": float(loss.exp())}


def reward_model_rows(config: EvalConfig, console: Console) -> tuple[Roles, Subject]:
    if config.reference:
        raise ConfigError(f"reference: is of a policy's implicit rewards, and {config.model} is a reward model; leave it out")
    roles = open_reward_model(config.model, config.trust_remote_code)
    console.note(f"{config.model}: a reward model, evaluated on pairs of a chosen and a rejected reply, or on ranked replies")
    examples = read_pairs(config, roles, f"{config.model} is a reward model, evaluated on pairs", console)

    def measure(roles: Roles) -> Tensor:
        """All scores, and after them those of replies scored alone."""
        places = console.counted(
            chunks(range(len(examples)), config.batch_size),
            len(examples),
            "rows",
            lambda part: tokens_of([examples[place] for place in part]),
        )
        parts = (MicroBatch(part, 1.0) for part in places)
        scores = score_all(roles.policy, examples, parts, roles.device)
        return torch.cat([scores, score_alone(roles.policy, examples, roles.device)])

    return roles, _of_pairs(config, REWARD_MODEL, examples, measure)


def implicit_rows(config: EvalConfig, console: Console) -> tuple[Roles, Subject]:
    """A reply's score is beta * (log pi - log pi_ref), as in DPO (Rafailov et al. 2023, arXiv:2305.18290) and in KTO."""
    assert config.reference is not None
    roles = open_policy(config.model, config.trust_remote_code)
    console.note(f"{config.model}: a policy, evaluated by its implicit rewards on pairs, measured from {config.reference}")
    examples = read_pairs(config, roles, f"{config.model} is evaluated on pairs", console)
    require_same_tokenizer(config.model, roles.tokenizer, "reference", config.reference, config.trust_remote_code)
    reference = open_policy(config.reference, config.trust_remote_code)
    (precision,) = precisions(config)
    groups = [[reply_row(example.prompt, reply) for reply in example.replies] for example in examples]
    ids = [row.prompt + row.reply for group in groups for row in group]
    reference.check_context(max(map(len, ids)), "data.max_length", f"the reference {config.reference}")
    with computing_in(precision, reference, ids, config.batch_size):
        of_reference = require_finite(reply_logprobs(reference, groups, config.batch_size, console, "rows"), config.reference)
    del reference

    def measure(roles: Roles) -> Tensor:
        alone = reply_logprobs(roles, groups[:ALONE], 1, console, "rows")
        own = torch.cat([reply_logprobs(roles, groups, config.batch_size, console, "rows"), alone])
        return config.beta * (own - torch.cat([of_reference, of_reference[: len(alone)]]))

    return roles, _of_pairs(config, IMPLICIT, examples, measure)


def reply_logprobs(
    roles: Roles, groups: Sequence[Sequence[Row]], batch_size: int, console: Console, what: str, temperature: float = 1.0
) -> Tensor:
    """(R,) in float64: log p of whole replies; `groups` are replies to one prompt each, of which so many share a pass."""
    tokens = lambda part: sum(len(group[0].prompt) + sum(len(row.reply) for row in group) for group in part)  # noqa: E731
    found = []
    for part in console.counted(chunks(groups, batch_size), len(groups), what, tokens):
        rows = [row for group in part for row in group]
        of_tokens = roles.policy(token_batch(rows).to(roles.device), roles=("actor",), temperature=temperature).logprobs
        found.append(reply_sums(of_tokens.double().cpu(), [len(row.reply) for row in rows]))
    return torch.cat(found)


def require_finite(numbers: Tensor, spec: str) -> Tensor:
    """The numbers; raises CheckFailed where the model gave one that is none."""
    if wrong := int((~numbers.isfinite()).sum()):
        raise CheckFailed(
            f"{spec}: {wrong} of the {len(numbers)} numbers that it gives these rows are NaN or infinite: its weights are "
            "broken, or too large for the precision"
        )
    return numbers


def read_pairs(config: EvalConfig, roles: Roles, whose: str, console: Console) -> list[RankedExample]:
    """Sorted by length. Raises ConfigError where a field of texts is given, DataError where nothing can be right or wrong."""
    refuse_fields_of_texts(config, f"{whose}; that is for policies on texts")
    template = Template(roles.tokenizer, config.data.template, roles.stop_ids)
    found = ranked_examples(file_of(config), config.data, template, dict.fromkeys(config.slice, "--slice"))
    say(console, found.notes)
    examples = sorted(found.items, key=len)
    roles.check_context(len(examples[-1]), "data.max_length")
    require_decided(examples, file_of(config))
    return examples


def _of_pairs(config: EvalConfig, kind: str, examples: list[RankedExample], measure: Callable[[Roles], Tensor]) -> Subject:
    replies = sum(len(example.replies) for example in examples)

    def totals(numbers: Tensor) -> Totals:
        pairs = comparisons(examples, like=numbers)
        right = pairs.decided * accuracy(numbers[pairs.better], numbers[pairs.worse])
        counts = [len(example.comparisons) for example in examples]
        parts = zip(examples, right.split(counts), pairs.decided.split(counts), strict=True)
        return {example.where: (float(own.sum()), float(decided.sum())) for example, own, decided in parts if decided.any()}

    def details(numbers: Tensor) -> dict[str, Any]:
        scores = numbers[:replies]
        return {"reliability": reliability_table(examples, scores), "slices": slices(examples, scores, config.slice)}

    return Subject(
        kind,
        counted(examples),
        [example.prompt + reply for example in examples for reply in example.replies],
        measure,
        lambda numbers: figures(examples, numbers[:replies], numbers[replies:]),
        totals,
        details,
    )


def file_of(config: EvalConfig) -> str:
    """The rows or prompts; one of them is given."""
    file = config.data.file or config.prompts
    assert file is not None
    return file


def refuse_fields_of_texts(config: EvalConfig, why: str) -> None:
    for field, default in (("json_key", None), ("loss_on", "responses")):
        if getattr(config.data, field) != default:
            raise ConfigError(f"data.{field}: {why}")


def say(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.note(note)
