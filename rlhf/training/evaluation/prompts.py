"""A policy on prompts: what its replies score, how long they are, how far from a reference, how often they beat another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhf.config.commands import EvalConfig
from rlhf.errors import DataError
from rlhf.functional.intervals import bootstrap_interval
from rlhf.functional.preference import accuracy, wilson_interval
from rlhf.models.source import resolve
from rlhf.report.console import Console
from rlhf.rollout.engines import Samples
from rlhf.rollout.readers import open_readers_of
from rlhf.rollout.rewards import Scores
from rlhf.runs.gate import reward_gate
from rlhf.training.evaluation.judge import Pair, Verdicts, command_of, verdicts
from rlhf.training.evaluation.replies import Answered, answered, kl, require_reference, scored
from rlhf.training.evaluation.rows import POLICY, file_of, refuse_fields_of_texts, say

OWN, OTHER = "model", "against"

Figure = dict[str, float | None]
"""mean, low and high: the ends of its 95% interval, None where there are too few replies for one."""


def on_prompts(config: EvalConfig, console: Console, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Figures by policy, `wins` by who says so, and `replies`, a row for each prompt.

    Args:
        save: is given the same without the judge's verdicts, before the judge is asked: it may fail.

    Raises:
        DataError, CheckFailed: as of the models, functions and files it opens, and of what they give.
    """
    refuse_fields_of_texts(config, "prompts are given; that is for rows with replies")
    rewarded = bool(config.reward.model_fields_set)
    say(console, reward_gate(config.reward) if rewarded else [])
    readers = open_readers_of(config.reward, [file_of(config)], config.data.max_line_bytes) if rewarded else {}
    # All mistakes are told before anything is sampled.
    if config.judge.command is not None:
        command_of(config.judge)
    for spec in (config.model, config.against, config.reference, *(config.reward.models.values() if rewarded else ())):
        if spec is not None:
            resolve(spec)
    if config.reference:
        require_reference(config)

    answers = {OWN: answered(config, config.model, readers, console, config.reference is not None)}
    if config.against:
        answers[OTHER] = answered(config, config.against, readers, console)
        answers = _of_the_same_prompts(answers, file_of(config))
    figures = {who: of_replies(answer.samples) for who, answer in answers.items()}
    apart = kl(config, answers[OWN], console) if config.reference else None
    if apart is not None:
        figures[OWN]["kl"] = of_mean(apart)
    scores = dict(zip(answers, scored(config, readers, answers.values(), console), strict=True)) if rewarded else {}
    for who, found in scores.items():
        figures[who] = of_scores(found) | figures[who]
    found = {
        "model": config.model,
        "kind": POLICY,
        "data": file_of(config),
        **({"against": config.against} if config.against else {}),
        "prompts": len(answers[OWN].prompts),
        "temperature": config.temperature,
        "seed": config.seed,
        "without_score": sum(int((~found.kept).sum()) for found in scores.values()),
        "figures": figures,
        "wins": wins(answers, scores, None),
        "replies": _rows(answers, scores, apart, None),
    }
    if config.judge.command is None:
        return found
    save(found)
    judged = verdicts(config.judge, _pairs(answers))
    return found | {"wins": wins(answers, scores, judged), "replies": _rows(answers, scores, apart, judged)}


def of_replies(samples: Samples) -> dict[str, Figure]:
    """`length` in tokens, the stop token one of them; `ended`: the part of replies that ended by themselves."""
    lengths = torch.tensor([len(response) for response in samples.responses], dtype=torch.float64)
    ended = sum(samples.finished)
    low, high = wilson_interval(float(ended), len(samples))
    return {"length": of_mean(lengths), "ended": {"mean": ended / len(samples), "low": low, "high": high}}


def of_scores(scores: Scores) -> dict[str, Figure]:
    """Means over replies that have a score; of several sources each, as it came."""
    found = {"reward": scores.scores} | {f"reward/{name}": values for name, values in scores.components.items()}
    return {name: of_mean(values[~values.isnan()]) for name, values in found.items() if not values.isnan().all()}


def of_mean(values: Tensor) -> Figure:
    low, high = bootstrap_interval(values) or (None, None)
    return {"mean": float(values.double().mean()), "low": low, "high": high}


def wins(answers: dict[str, Answered], scores: dict[str, Scores], judged: Verdicts | None) -> dict[str, dict[str, float]]:
    """How often the model's reply is better, by the reward and by the judge; a reply without a score is not compared."""
    found: dict[str, dict[str, float]] = {}
    if len(scores) == 2:
        kept = scores[OWN].kept & scores[OTHER].kept
        outcomes = accuracy(scores[OWN].scores, scores[OTHER].scores)
        # Beside other rows the score of the same reply may be another in its last digits.
        outcomes[torch.tensor(_alike(answers[OWN], answers[OTHER]))] = 0.5
        found["reward"] = won(outcomes[kept])
    if judged is not None:
        of_judge = {"asked": judged.asked, "agreed": judged.agreed, "first": judged.first}
        found["judge"] = won(torch.tensor(judged.outcomes)) | of_judge
    return found


def won(outcomes: Tensor) -> dict[str, float]:
    """Of outcomes 1, 0 and 0.5, a tie: the rate, a tie half of it, with Wilson's 95% interval."""
    low, high = wilson_interval(float(outcomes.double().sum()), len(outcomes))
    counts = {name: int((outcomes == worth).sum()) for name, worth in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))}
    rate = float(outcomes.double().mean()) if len(outcomes) else 0.5
    return {"win_rate": rate, "win_rate_low": low, "win_rate_high": high, **counts}


def _of_the_same_prompts(answers: dict[str, Answered], file: str) -> dict[str, Answered]:
    """By either tokenizer other prompts may be too long."""
    both = set.intersection(*({prompt.index for prompt in answer.prompts} for answer in answers.values()))
    if not both:
        raise DataError(f"{file}: no prompt is short enough for both policies; raise data.max_length")
    return {who: answer.only(both) for who, answer in answers.items()}


def _alike(one: Answered, other: Answered) -> list[bool]:
    """Of each prompt, whether both replies are the same text, and both ended or neither."""
    ours, theirs = (zip(answer.texts, answer.samples.finished, strict=True) for answer in (one, other))
    return [a == b for a, b in zip(ours, theirs, strict=True)]


def _pairs(answers: dict[str, Answered]) -> list[Pair]:
    texts = zip(answers[OWN].prompts, answers[OWN].texts, answers[OTHER].texts, strict=True)
    return [Pair(prompt.row.fields["prompt"], a, b) for prompt, a, b in texts]


def _rows(
    answers: dict[str, Answered], scores: dict[str, Scores], apart: Tensor | None, judged: Verdicts | None
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for at, prompt in enumerate(answers[OWN].prompts):
        row: dict[str, Any] = {"prompt": prompt.row.fields["prompt"]}
        for who, answer in answers.items():
            samples = answer.samples
            row[who] = {"response": answer.texts[at], "tokens": len(samples.responses[at]), "finished": samples.finished[at]}
            if who in scores:
                row[who]["score"] = float(scores[who].scores[at]) if scores[who].kept[at] else None
        if apart is not None:
            row[OWN]["kl"] = float(apart[at])
        rows.append(row | ({"judged": judged.outcomes[at]} if judged is not None else {}))
    return rows
