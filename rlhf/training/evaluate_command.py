"""`rlhf eval`: how good a model is on held-out rows, and what FP8 takes away from it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.config.parse import Invocation
from rlhf.data.collate import sft_batch
from rlhf.data.examples import SftExample, ranked_examples, sft_examples
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.errors import ConfigError
from rlhf.models.load import is_scalar
from rlhf.models.precision import FP8, computing_in, precisions
from rlhf.models.roles import Roles, open_policy, open_reward_model
from rlhf.report.console import Console
from rlhf.training.accumulation import MicroBatch
from rlhf.training.reward_figures import (
    Reliability,
    counted,
    figures,
    reliability_table,
    require_decided,
    score_all,
    score_alone,
)


@dataclass(frozen=True)
class Subject:
    """A model with its rows. `measure` computes one number a token (log-probability) or a reply (score), always in the same
    order, and `figures` says what they come to."""

    roles: Roles
    kind: str
    counts: dict[str, Any]
    rows: list[list[int]]
    measure: Callable[[], Tensor]
    figures: Callable[[Tensor], dict[str, float]]
    reliability: Callable[[Tensor], Reliability] | None = None
    """Of a reward model: what it says beside what is so."""


def evaluate(invocation: Invocation[EvalConfig]) -> int:
    config, console = invocation.config, Console("eval", speak=True)
    subject = (_reward_model if is_scalar(config.model, config.trust_remote_code) else _policy)(config, console)
    measured: dict[str, Tensor] = {}
    for precision in precisions(config):
        with computing_in(precision, subject.roles, subject.rows, config.batch_size) as in_fp8:
            if in_fp8:
                console.note(in_fp8)
            measured[precision.name] = subject.measure()
    result = {"model": config.model, "kind": subject.kind, "data": config.data.file, **subject.counts}
    result |= compared({name: measured[name] for name in reversed(measured)}, subject.figures)
    if subject.reliability is not None:
        result["reliability"] = {name: subject.reliability(numbers) for name, numbers in measured.items()}
    print(json.dumps(result, indent=2) if invocation.as_json else "\n".join(table(result)))
    return 0


def compared(measured: dict[str, Tensor], figures: Callable[[Tensor], dict[str, float]]) -> dict[str, Any]:
    """The figures by precision and, where FP8 stands beside another, the differences and the drift of single numbers."""
    found: dict[str, Any] = {"figures": {name: figures(numbers) for name, numbers in measured.items()}}
    if len(measured) == 2:
        (plain, without), (_, with_fp8) = measured.items()
        drift = (with_fp8 - without).abs()
        before, after = found["figures"][plain], found["figures"][FP8]
        found["difference"] = {name: after[name] - before[name] for name in before}
        found["drift"] = {"mean": float(drift.mean()), "max": float(drift.max())}
    return found


def table(result: dict[str, Any]) -> Iterable[str]:
    columns = {**result["figures"], **({"difference": result["difference"]} if "difference" in result else {})}
    counts = ", ".join(f"{value:,} {name}" for name, value in result.items() if isinstance(value, int))
    yield f"{result['model']}: a {result['kind']}, {counts} of {result['data']}"
    yield " " * 20 + "".join(f"{name:>14}" for name in columns)
    for name in next(iter(result["figures"].values())):
        cells = (
            f"{column[name]:>+14.6f}" if title == "difference" else f"{column[name]:>14.6f}"
            for title, column in columns.items()
        )
        yield f"{name:20}" + "".join(cells)
    if "longer_wins" in result:
        yield f"taking the longer reply is right in {result['longer_wins']:.3f}"
    for precision, bins in result.get("reliability", {}).items():
        yield f"{precision}: how sure it is, and how often it is right"
        for sure, row in bins.items():
            yield f"  {sure}: says {row['predicted']:.3f}, right in {row['observed']:.3f} of {row['prompts']:.6g}"
    if "drift" in result:
        unit = "log-probability of a token" if result["kind"] == "policy" else "score of a reply"
        yield f"FP8 moves the {unit} by {result['drift']['mean']:.2e} in the mean, {result['drift']['max']:.2e} at most"


def _policy(config: EvalConfig, console: Console) -> Subject:
    roles = open_policy(config.model, config.trust_remote_code)
    console.note(f"{config.model}: a policy, evaluated on chats, prompts with completions, or text")
    found = sft_examples(config.data.file, config.data, Template(roles.tokenizer, config.data.template, roles.stop_ids))
    _say(console, found.notes)
    rows = sorted(found.items, key=len)  # rows of like length share a forward pass
    roles.check_context(len(rows[-1]), "data.max_length")
    counts = {"rows": len(rows), "tokens": sum(sum(row.trained[1:]) for row in rows)}
    return Subject(
        roles, "policy", counts, [row.ids for row in rows], lambda: logprobs(roles, rows, config.batch_size), policy_figures
    )


def logprobs(roles: Roles, rows: Sequence[SftExample], batch_size: int) -> Tensor:
    """(tokens,) in float64: of every trained token, but for the first of a row, which nothing predicts."""
    batches = (sft_batch(part).to(roles.device) for part in chunks(rows, batch_size))
    return torch.cat([roles.policy(batch, roles=("actor",)).logprobs.double().cpu() for batch in batches])


def policy_figures(logprobs: Tensor) -> dict[str, float]:
    loss = -logprobs.mean()
    return {"loss": float(loss), "perplexity": float(loss.exp())}


def _reward_model(config: EvalConfig, console: Console) -> Subject:
    for field, default in (("json_key", None), ("loss_on", "responses")):
        if getattr(config.data, field) != default:
            raise ConfigError(f"data.{field}: {config.model} is a reward model, evaluated on pairs; that is for policies")
    roles = open_reward_model(config.model, config.trust_remote_code)
    console.note(f"{config.model}: a reward model, evaluated on pairs of a chosen and a rejected reply, or on ranked replies")
    found = ranked_examples(config.data.file, config.data, Template(roles.tokenizer, config.data.template, roles.stop_ids))
    _say(console, found.notes)
    examples = sorted(found.items, key=len)
    roles.check_context(len(examples[-1]), "data.max_length")
    require_decided(examples, config.data.file)
    replies = sum(len(example.replies) for example in examples)

    def measure() -> Tensor:
        """All scores, and after them those of replies scored alone."""
        parts = [MicroBatch(part, 1.0) for part in chunks(range(len(examples)), config.batch_size)]
        scores = score_all(roles.policy, examples, parts, roles.device)
        return torch.cat([scores, score_alone(roles.policy, examples, roles.device)])

    return Subject(
        roles,
        "reward model",
        counted(examples),
        [example.prompt + reply for example in examples for reply in example.replies],
        measure,
        lambda scores: figures(examples, scores[:replies], scores[replies:]),
        lambda scores: reliability_table(examples, scores[:replies]),
    )


def _say(console: Console, notes: Sequence[str]) -> None:
    for note in notes:
        console.note(note)
