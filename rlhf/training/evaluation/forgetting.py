"""What training took away: a model and the one it was made from, on the same rows.

The difference is taken row by row, so what makes a row hard for both does not blur it. The interval is the paired bootstrap
over rows; a document that was split, or a prompt with several replies, is one row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.data.templates import tokenizer_digests
from rlhf.errors import CheckFailed, DataError
from rlhf.functional.intervals import bootstrap_interval
from rlhf.models.load import is_scalar, load_tokenizer
from rlhf.models.precision import computing_in, precisions
from rlhf.models.roles import open_policy
from rlhf.report.console import Console
from rlhf.training.evaluation.rows import POLICY, Subject, Totals, require_finite

Measure = Callable[[EvalConfig, Console], tuple[Subject, dict[str, Tensor]]]


def beside_base(config: EvalConfig, console: Console, subject: Subject, numbers: Tensor, measure: Measure) -> dict[str, Any]:
    """`lost` and its interval; `failed`, in words, where that is more than `max_forgetting`.

    Args:
        numbers: of the model, on the rows of `subject`.
        measure: evaluates another model; of a reward model, which reads the rows with its own tokenizer.

    Raises:
        DataError: the base is of another kind, has another tokenizer or too few positions, or fewer than two rows are compared.
        CheckFailed: what the base gives the rows are no finite numbers.
    """
    base = config.base
    assert base is not None
    if is_scalar(base, config.trust_remote_code) == (subject.kind == POLICY):
        raise DataError(f"base {base}: {config.model} is a {subject.kind}, this is not; give the model that it was made from")
    if subject.kind == POLICY:
        _require_same_vocabulary(config, base)
        roles = open_policy(base, config.trust_remote_code)
        roles.check_context(max(map(len, subject.ids)), "data.max_length", f"the base {base}")
        (precision,) = precisions(config)
        with computing_in(precision, roles, subject.ids, config.batch_size):
            before = subject.totals(require_finite(subject.measure(roles), base))
    else:
        of_base, measured = measure(config.model_copy(update={"model": base}), console)
        before = of_base.totals(*measured.values())
    return judged(before, subject.totals(numbers), subject.kind == POLICY, base, config.max_forgetting)


def judged(before: Totals, after: Totals, is_policy: bool, base: str, limit: float | None) -> dict[str, Any]:
    """Of a policy what is lost is loss that was gained, of a reward model accuracy that is gone; rows of both only.

    Raises:
        DataError: fewer than two rows can be compared.
        CheckFailed: a number of a row is not finite; it would be neither above a limit nor below.
    """
    both = [row for row in after if row in before]
    for row in both:
        if not all(map(math.isfinite, (*before[row], *after[row]))):
            sides = f"{before[row][0]} before, {after[row][0]} after"
            raise CheckFailed(f"{row}: what is compared with the base {base} is not finite: {sides}; one of them is broken")
    sums = torch.tensor([(*before[row], *after[row]) for row in both], dtype=torch.float64).reshape(-1, 4)
    total_before, count, total_after, _ = sums.T
    lost = (total_after - total_before) * (1.0 if is_policy else -1.0)
    interval = bootstrap_interval(lost, count)
    if interval is None:
        raise DataError(
            f"base {base}: {len(both)} of the rows can be compared, expected two at least: one does not show how rows differ"
        )
    of = "loss" if is_policy else "accuracy"
    found: dict[str, Any] = {"base": base, "rows": len(both), "of": of}
    found |= {"before": float(total_before.sum() / count.sum()), "after": float(total_after.sum() / count.sum())}
    found |= {"lost": float(lost.sum() / count.sum()), "lost_low": interval[0], "lost_high": interval[1]}
    if is_policy:
        ratios = {f"perplexity_ratio{end}": math.exp(found[f"lost{end}"]) for end in ("", "_low", "_high")}
        found |= {"perplexity_before": math.exp(found["before"]), "perplexity_after": math.exp(found["after"]), **ratios}
    return found | _verdict(found, limit)


def _verdict(found: dict[str, Any], limit: float | None) -> dict[str, Any]:
    low, high, unit = found["lost_low"], found["lost_high"], "nats per token" if found["of"] == "loss" else "of accuracy"
    said = f"{found['lost']:.4f} {unit} lost (95%: {low:.4f} to {high:.4f}, {found['rows']} rows)"
    if limit is None:
        what = (
            "worse than its base" if low > 0 else "better than its base" if high < 0 else "no difference that these rows show"
        )
        return {"verdict": what}
    if low > limit:
        return {
            "max_forgetting": limit,
            "verdict": "refused",
            "failed": f"forgetting: {said}, more than max_forgetting {limit:g}: the model is worse than its base "
            f"{found['base']} on these rows; train shorter, at a lower rate or nearer to the base, or allow more "
            "(rlhf explain eval/lost)",
        }
    if not high <= limit:
        return {
            "max_forgetting": limit,
            "verdict": f"not refused, but the interval reaches beyond {limit:g}: more rows would tell",
        }
    return {"max_forgetting": limit, "verdict": f"at most {limit:g} is lost"}


def _require_same_vocabulary(config: EvalConfig, base: str) -> None:
    """Losses are of tokens, so both must have the same ones; the base reads the rows by the chat template of the model."""
    ours, theirs = (
        tokenizer_digests(load_tokenizer(spec, config.trust_remote_code))["tokenizer"] for spec in (config.model, base)
    )
    if ours != theirs:
        raise DataError(
            f"base {base}: its tokenizer is not that of {config.model}, and a loss per token is of one tokenizer; give the "
            "model that it was made from"
        )
