"""From samples to experience: what each policy thought of every token, and what each reply scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from rlhf.models.roles import Reference
from rlhf.rollout.engines import Samples
from rlhf.rollout.experience import Experience, reply_tensors
from rlhf.rollout.rewards import Scores

Prompt = TypeVar("Prompt")


@dataclass(frozen=True)
class Scored:
    """Replies, and what each scored."""

    samples: Samples
    scores: Scores

    def __len__(self) -> int:
        return len(self.samples)

    def rows(self, indices: Sequence[int]) -> Scored:
        return Scored(self.samples.rows(indices), self.scores.rows(indices))


def join(parts: Sequence[Scored], order: Sequence[int]) -> Scored:
    """One after the other, row i of the whole then put at place order[i]."""
    back = torch.tensor(list(order)).argsort().tolist()
    samples, scores = Samples.joined([part.samples for part in parts]), Scores.joined([part.scores for part in parts])
    return Scored(samples, scores).rows(back)


def in_places_of(
    asked: Sequence[Prompt],
    scored: Scored,
    places: Sequence[int],
    drawn: Sequence[Prompt],
    more: Scored,
    useful: Sequence[int],
) -> tuple[list[Prompt], Scored]:
    """Prompts at `places`, with their groups of replies, give way to the `useful` ones of those drawn, while there are any."""
    size, asked = len(more) // len(drawn), list(asked)
    groups = list(range(len(asked)))
    for place, group in zip(places, useful, strict=False):
        asked[place], groups[place] = drawn[group], len(groups) + group
    rows = [group * size + reply for group in groups for reply in range(size)]
    return asked, join([scored, more], range(len(scored) + len(more))).rows(rows)


@torch.no_grad()
def score(
    scored: Scored,
    micro_batches: Sequence[tuple[Sequence[int], float]],
    policy: nn.Module,
    has_critic: bool,
    reference: Reference | None,
    temperature: float,
    pad_id: int,
) -> Experience:
    """Recomputes log-probabilities and values with the forward of the update, row by row in the given micro-batches.

    They are recomputed because a decode with a KV cache is not bitwise a forward over the whole reply: only numbers from the
    same micro-batches through the same forward make the first ratio of an update exactly 1. A micro-batch of weight 0 is one
    that only other ranks have: it is computed along with them.
    """
    samples = scored.samples
    tokens, mask, sampled = reply_tensors(samples, pad_id)
    device = next(policy.parameters()).device
    experience = Experience(
        prompts=samples.prompts,
        tokens=tokens,
        mask=mask,
        finished=torch.tensor(samples.finished),
        sampled_logprobs=sampled,
        logprobs=_blank(policy, mask),
        values=_blank(policy, mask) if has_critic else None,
        reference_logprobs=None if reference is None else _blank(policy, mask),
        scores=scored.scores.scores,
        kept=scored.scores.kept,
        components=scored.scores.components,
    )
    for rows, weight in micro_batches:
        part = experience.rows(rows)
        batch = part.batch().to(device)
        output = policy(batch, temperature=temperature)
        thought = None if reference is None else reference.logprobs(batch, temperature)
        if not weight:
            continue
        _put(experience.logprobs, rows, part.spread(output.logprobs.cpu()))
        if experience.values is not None:
            _put(experience.values, rows, part.spread(output.values.cpu()))
        if thought is not None:
            assert experience.reference_logprobs is not None
            _put(experience.reference_logprobs, rows, part.spread(thought.cpu()))
    return experience


def _blank(policy: nn.Module, mask: Tensor) -> Tensor:
    dtype = next(policy.parameters()).dtype
    return torch.zeros(mask.shape, dtype=torch.promote_types(dtype, torch.float32))


def _put(whole: Tensor, rows: Sequence[int], part: Tensor) -> None:
    whole[torch.tensor(list(rows)), : part.shape[1]] = part.to(whole.dtype)
