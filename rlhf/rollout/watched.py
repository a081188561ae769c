"""What of an iteration must be finite before its update, and how a person finds the reply where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.rewards import Reward
from rlhf.data.examples import PromptExample
from rlhf.rollout.credit import reply_kl
from rlhf.rollout.experience import Experience


def watched(experience: Experience) -> dict[str, Tensor]:
    """By name, each (B,) or (B, T); what follows from another comes after it."""
    found = {
        "score": experience.scores.masked_fill(~experience.scored, 0.0),
        "KL": None if experience.reference_logprobs is None else reply_kl(experience),
        "return": experience.returns,
        "advantage": experience.advantages,
    }
    return {name: values for name, values in found.items() if values is not None}


def found_again(
    experience: Experience, asked: Sequence[PromptExample], tokenizer: PreTrainedTokenizerBase, reward: Reward, row: int
) -> dict[str, Any]:
    """A reply as JSON: the prompt's place in its file, texts and token ids, what it scored."""
    scored_by = ", ".join(part.source for part in reward.parts.values())
    ids = experience.tokens[row][experience.mask[row].bool()].tolist()
    return {
        "where": f"{asked[row].row.where}, reply {row} scored by {scored_by}",
        "prompt": asked[row].text,
        "prompt_ids": experience.prompts[row],
        "reply": tokenizer.decode(ids),
        "reply_ids": ids,
        "score": float(experience.scores[row]),
        **{f"score of {name}": float(scores[row]) for name, scores in experience.components.items()},
        "kl": None if experience.reference_logprobs is None else float(reply_kl(experience)[row]),
    }
