"""What the files of a run say about it, in plain words: one finding a line, and the worst of them is the verdict."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

Level = Literal["good", "warn", "bad"]
ORDER: tuple[Level, ...] = ("good", "warn", "bad")

MANY_CLIPPED = 0.3
"""Share of tokens whose ratio left the clip range; above it most of a minibatch's gradient may be gone."""
FEW_ENDED = 0.8
ENTROPY_LEFT = 0.1
"""Of what it was in the first iterations, where a run has no limit of its own (alarms.entropy_left)."""
LENGTH_CORRELATION = 0.3
CALIBRATION_ERROR = 0.1
HIGH_KL = 50.0
"""Nats a reply; beyond it a policy is another model, whose rewards mostly say what the reward model overlooks."""
WARNING = "warning: "
"""How a note begins that is one."""


@dataclass(frozen=True)
class Finding:
    level: Level
    text: str


def worst(findings: Sequence[Finding]) -> Level:
    return ORDER[max((ORDER.index(finding.level) for finding in findings), default=0)]


def ending(state: str, reason: str) -> Finding:
    said = f": {reason}" if reason else ""
    match state:
        case "done":
            return Finding("good", "The run is done.")
        case "failed":
            return Finding("bad", f"The run failed{said}")
        case "preempted":
            return Finding("warn", f"The run was stopped and can go on{said}")
        case "running":
            return Finding("warn", "The run has not ended, or was killed; the figures are those up to now.")
        case _:
            return Finding("warn", "The run left no word on how it ended.")


def warned(notes: Sequence[tuple[int, str]]) -> list[Finding]:
    """Of what the stage said, the warnings: each once, with the step it came at first."""
    first: dict[str, int] = {}
    for step, text in notes:
        if text.startswith(WARNING):
            first.setdefault(text.removeprefix(WARNING), step)
    places = {text: f" (after step {step})" if step else "" for text, step in first.items()}
    return [Finding("warn", f"{text[:1].upper()}{text[1:]}{place}") for text, place in places.items()]


def findings(stage: str, config: dict[str, Any], result: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Finding]:
    """Of the figures. Nothing is said of what was not measured."""
    if stage in ("ppo", "grpo"):
        return [*_reward(result, metrics), *_kl(config, metrics), *_policy(config, metrics)]
    if stage in ("rm", "dpo", "kto"):
        return [*_accuracy(result), *_loss(metrics)]
    return _loss(metrics)


def series(metrics: list[dict[str, Any]], name: str) -> list[float]:
    return [float(record[name]) for record in metrics if _number(record.get(name))]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _reward(result: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Finding]:
    """A rise counts where it is more than two standard errors of the difference of the means."""
    before, after = (result.get(name, {}).get("score") for name in ("before", "after"))
    variances = [result.get(name, {}).get("score_standard_error", 0.0) ** 2 for name in ("before", "after")]
    where = "on held-out prompts"
    if before is None or after is None:
        trained = [record for record in metrics if _number(record.get("reward/score"))]
        if len(trained) < 2:
            return []
        end = max(1, len(trained) // 5)
        before, after = (sum(series(part, "reward/score")) / len(part) for part in (trained[:end], trained[-end:]))
        where = "on the prompts trained on, first against last iterations"
        variances = [
            record["reward/score_std"] ** 2 / record["rollout/count"] / end
            for record in (trained[:1] + trained[-1:])
            if _number(record.get("reward/score_std")) and record.get("rollout/count")
        ]
    noise, told = 2 * math.sqrt(sum(variances)), f"from {before:.3g} to {after:.3g} {where}"
    if after - before > noise:
        return [Finding("good", f"The reward rose {told}.")]
    if before - after > noise:
        return [Finding("bad", f"The reward fell {told}.")]
    return [Finding("warn", f"The reward hardly moved, {told}; chance alone moves it by {noise:.2g}.")]


def _kl(config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Finding]:
    kl = series(metrics, "kl/sequence")
    if not kl:
        return []
    told, budget = f"{kl[-1]:.3g} nats a reply at the end, {max(kl):.3g} at most", kl_budget(config)
    if kl[-1] < -HIGH_KL:
        return [
            Finding("warn", f"KL from the reference: {told}. It cannot be negative: log-probabilities are wrong somewhere.")
        ]
    if budget is None and max(kl) > HIGH_KL:
        return [Finding("warn", f"KL from the reference: {told}, which is far. Read the replies; kl.coef holds it back.")]
    if budget is None:
        return [Finding("good", f"KL from the reference: {told}. No budget was set (alarms.kl_budget).")]
    if max(kl) > budget:
        return [Finding("warn", f"KL from the reference left its budget of {budget:g}: {told}.")]
    return [Finding("good", f"KL from the reference stayed in its budget of {budget:g}: {told}.")]


def kl_budget(config: dict[str, Any]) -> float | None:
    """What the alarms allow: their limit, or twice what an adaptive controller steers to; a fixed coefficient has none."""
    kl, limit = config.get("kl", {}), config.get("alarms", {}).get("kl_budget")
    adaptive = kl.get("controller", "fixed") != "fixed"
    return limit or (2 * kl["target"] if adaptive else None)


def _policy(config: dict[str, Any], metrics: list[dict[str, Any]]) -> list[Finding]:
    found, entropy_left = [], config.get("alarms", {}).get("entropy_left", ENTROPY_LEFT)
    clipped, ended = series(metrics, "policy/clip_fraction"), series(metrics, "rollout/ended")
    entropy, explained = series(metrics, "policy/entropy"), series(metrics, "value/explained_variance")
    if clipped and (late := _late(clipped)) > MANY_CLIPPED:
        found.append(Finding("warn", f"{late:.0%} of tokens are clipped: lower optimizer.lr or the epochs."))
    if ended and (late := _late(ended)) < FEW_ENDED:
        found.append(Finding("warn", f"Only {late:.0%} of replies end by themselves: raise rollout.max_new_tokens."))
    if len(entropy) > 4 and _late(entropy) < entropy_left * entropy[0]:
        found.append(Finding("warn", f"Entropy fell from {entropy[0]:.3g} to {_late(entropy):.3g}: the policy is collapsing."))
    if len(explained) > 4 and (late := _late(explained)) < 0:
        found.append(Finding("warn", f"The critic explains nothing of the returns (explained variance {late:.2f})."))
    return found


def _accuracy(result: dict[str, Any]) -> list[Finding]:
    accuracy, low, high = (result.get(f"eval/{name}") for name in ("accuracy", "accuracy_low", "accuracy_high"))
    if accuracy is None or low is None or high is None:
        return []
    of = next((f"{result[name]} held-out {what}" for what in ("pairs", "replies") if (name := f"eval/{what}") in result), "")
    told = f"right on {accuracy:.1%} of {of or 'what was held out'} (95%: {low:.1%} to {high:.1%})"
    if high < 0.5:
        return [Finding("bad", f"It prefers what was rejected, so labels may be exchanged: {told}.")]
    found = [Finding("good", f"It is {told}.") if low > 0.5 else Finding("bad", f"No better than a coin: {told}.")]
    longer, correlation, error = (result.get(f"eval/{n}") for n in ("longer_wins", "length_correlation", "calibration_error"))
    if longer is not None and longer >= low:
        found.append(Finding("warn", f"Taking the longer reply, right on {longer:.1%}, may be as good."))
    if correlation is not None:
        biased = abs(correlation) > LENGTH_CORRELATION
        told = "Length bias: scores go with length" if biased else "Scores hardly go with length"
        found.append(Finding("warn" if biased else "good", f"{told} (correlation {correlation:+.2f}){_by_length(result)}."))
    if error is not None:
        off = error > CALIBRATION_ERROR
        found.append(Finding("warn" if off else "good", f"Calibration: it is {error:.1%} off in how sure it is, in the mean."))
    return found


def _by_length(result: dict[str, Any]) -> str:
    """How often it is right where the better reply is the shorter one, and where it is the longer."""
    shorter, longer = (result.get(f"eval/accuracy_of_{which}") for which in ("shorter", "longer"))
    if shorter is None or longer is None:
        return ""
    return f"; right on {shorter:.1%} where the shorter reply is the better one, on {longer:.1%} where the longer is"


def _loss(metrics: list[dict[str, Any]]) -> list[Finding]:
    if len(held_out := series(metrics, "eval/loss")) > 1:
        moved = held_out[-1] - held_out[0]
        level: Level = "good" if moved < 0 else "bad" if moved > 0 else "warn"
        found = [Finding(level, f"The held-out loss went from {held_out[0]:.4g} to {held_out[-1]:.4g}.")]
        if held_out[-1] > 1.05 * min(held_out):
            found.append(Finding("warn", f"It was {min(held_out):.4g} before: the run overfits."))
        return found
    loss = series(metrics, "loss")
    if len(loss) < 2:
        return []
    first, last, noise = _late(loss[::-1]), _late(loss), _noise(loss)
    told = f"The training loss went from {first:.4g} to {last:.4g}"
    if abs(last - first) <= noise:
        advice = "Train longer." if held_out else "Give data.eval, or train longer."
        return [Finding("warn", f"{told}; chance alone moves it by {noise:.2g}. {advice}")]
    return [Finding("good" if last < first else "bad", f"{told}.")]


def _noise(values: list[float]) -> float:
    """Two standard errors of the difference between the means of the first and last fifth, by how much neighbours differ."""
    squares = sum((later - earlier) ** 2 for earlier, later in pairwise(values)) / (len(values) - 1)
    return 2 * math.sqrt(squares / max(1, len(values) // 5))


def _late(values: list[float]) -> float:
    """Mean of the last fifth."""
    end = values[-max(1, len(values) // 5) :]
    return sum(end) / len(end)
