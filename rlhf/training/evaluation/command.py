"""`rlhf eval`: how good a model is, what FP8 takes away from it, and what training took away from its base."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from typing import Any

from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.config.parse import Invocation
from rlhf.errors import CheckFailed
from rlhf.models.load import is_scalar
from rlhf.models.precision import FP8, computing_in, precisions
from rlhf.models.roles import Roles
from rlhf.report.console import Console
from rlhf.training.evaluation.forgetting import beside_base
from rlhf.training.evaluation.prompts import on_prompts
from rlhf.training.evaluation.rows import Subject, file_of, implicit_rows, policy_rows, require_finite, reward_model_rows
from rlhf.training.evaluation.tables import table
from rlhf.training.output_file import require_new, write


def evaluate(invocation: Invocation[EvalConfig]) -> int:
    """Raises CheckFailed where more was lost than may be, after the result is told."""
    config, console = invocation.config, Console("eval", speak=True)
    output = require_new(config.output) if config.output else None

    def save(result: dict[str, Any], again: bool) -> None:
        if output is not None:
            write(output, json.dumps(result, indent=2, ensure_ascii=False) + "\n", again)

    def before_judge(result: dict[str, Any]) -> None:
        save(result, again=False)
        console.note(f"{output}: has replies and scores; the judge is asked now" if output else "the judge is asked now")

    with closing(console):
        result = on_prompts(config, console, before_judge) if config.prompts else of_rows(config, console)
    save(result, again=config.judge.command is not None)
    result.pop("replies", None)  # a file's worth of text
    print(json.dumps(result, indent=2) if invocation.as_json else "\n".join(table(result)))
    if refused := result.get("forgetting", {}).get("failed"):
        raise CheckFailed(refused)
    return 0


def of_rows(config: EvalConfig, console: Console) -> dict[str, Any]:
    subject, measured = measure(config, console)
    result = {"model": config.model, "kind": subject.kind, "data": file_of(config), **subject.counts}
    result |= compared({name: measured[name] for name in reversed(measured)}, subject.figures)
    for name, numbers in measured.items():
        for table_name, rows in subject.details(numbers).items():
            result.setdefault(table_name, {})[name] = rows
    if config.base:
        (numbers,) = measured.values()
        result["forgetting"] = beside_base(config, console, subject, numbers, measure)
    return result


def measure(config: EvalConfig, console: Console) -> tuple[Subject, dict[str, Tensor]]:
    """What is asked about the rows, and the numbers of the model, by precision."""
    scalar = is_scalar(config.model, config.trust_remote_code)
    read = reward_model_rows if scalar else implicit_rows if config.reference else policy_rows
    roles, subject = read(config, console)
    return subject, in_precisions(config, console, roles, subject)


def in_precisions(config: EvalConfig, console: Console, roles: Roles, subject: Subject) -> dict[str, Tensor]:
    measured: dict[str, Tensor] = {}
    for precision in precisions(config):
        with computing_in(precision, roles, subject.ids, config.batch_size) as in_fp8:
            if in_fp8:
                console.note(in_fp8)
            measured[precision.name] = require_finite(subject.measure(roles), f"{config.model} in {precision.name}")
    return measured


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
