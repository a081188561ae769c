"""How a policy does on fixed prompts: its scores, the user's own scorers, its distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf.data.examples import PromptExample
from rlhf.errors import DataError
from rlhf.rollout.credit import sequence_kl
from rlhf.rollout.experience import Experience
from rlhf.rollout.readers import Reader, checked_scores, read
from rlhf.rollout.rewards import decode, said


def evaluate(
    experience: Experience,
    asked: Sequence[PromptExample],
    scorers: Sequence[Reader],
    tokenizer: PreTrainedTokenizerBase,
    keep: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(means over all replies that have the number, with the standard error of the score's; the first `keep` replies with
    their scores).

    A scorer returns a list of numbers (None: it has none for that reply), or a dict of such lists by metric name.
    """
    mask, finished = experience.mask, experience.finished.tolist()
    replies = [tokens[real.bool()].tolist() for tokens, real in zip(experience.tokens, mask, strict=True)]
    responses = decode(said(replies, finished), tokenizer)
    told = zip(experience.scores.tolist(), experience.scored.tolist(), strict=True)
    columns: dict[str, list[float | None]] = {"score": [score if kept else None for score, kept in told]}
    columns |= {"length": mask.sum(1).double().tolist(), "ended": experience.finished.double().tolist()}
    for name, component in experience.components.items():
        columns[name] = [None if math.isnan(score) else score for score in component.tolist()]
    for scorer in scorers:
        values = read(scorer, asked, responses, tokens=replies, finished=finished)
        named = values if isinstance(values, dict) else {scorer.source.rpartition(":")[2]: values}
        if taken := sorted(columns.keys() & named.keys()):
            raise DataError(f"{scorer.source}: {taken[0]} is the name of another metric; give it another")
        columns |= {name: checked_scores(column, len(asked), scorer.source) for name, column in named.items()}
    there = {name: [value for value in column if value is not None] for name, column in columns.items()}
    metrics = {name: sum(values) / len(values) for name, values in there.items() if values}
    if len(scores := there["score"]) > 1:
        metrics["score_standard_error"] = float(torch.tensor(scores).double().std()) / math.sqrt(len(scores))
    if experience.reference_logprobs is not None:
        metrics["kl"] = sequence_kl(experience)
    samples = [
        {
            "prompt": asked[row].text,
            "response": responses[row],
            "scores": {
                name: round(value, 4)
                for name, column in columns.items()
                if (value := column[row]) is not None and math.isfinite(value)
            },
        }
        for row in range(min(keep, len(asked)))
    ]
    return metrics, samples
