"""How a policy does on fixed prompts: its scores, the user's own scorers, its distance from the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.rollout.credit import sequence_kl
from rlhf.rollout.experience import Experience
from rlhf.rollout.rewards import Reader, checked_scores, decode


def evaluate(
    experience: Experience, texts: Sequence[str], scorers: Sequence[Reader], tokenizer: PreTrainedTokenizerBase, keep: int
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """(means over all replies, the first `keep` replies with their scores).

    A scorer returns a list of numbers, or a dict of such lists by metric name.
    """
    mask = experience.mask
    replies = [tokens[real.bool()].tolist() for tokens, real in zip(experience.tokens, mask, strict=True)]
    responses = decode(replies, tokenizer)
    columns: dict[str, list[float]] = {"score": experience.scores.tolist(), "length": mask.sum(1).double().tolist()}
    columns["ended"] = experience.finished.double().tolist()
    for scorer in scorers:
        values, function = scorer(texts, responses), scorer.source.rpartition(":")[2]
        named = values if isinstance(values, dict) else {function: values}
        columns |= {name: checked_scores(column, len(texts), scorer.source) for name, column in named.items()}
    metrics = {name: sum(column) / len(column) for name, column in columns.items()}
    if experience.reference_logprobs is not None:
        metrics["kl"] = sequence_kl(experience)
    samples = [
        {
            "prompt": texts[row],
            "response": responses[row],
            "scores": {name: round(column[row], 4) for name, column in columns.items() if math.isfinite(column[row])},
        }
        for row in range(min(keep, len(texts)))
    ]
    return metrics, samples
