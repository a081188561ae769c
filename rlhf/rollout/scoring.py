"""From samples to experience: what each policy thought of every token, and what each reply scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rlhf.data.examples import PromptExample
from rlhf.models.roles import Reference
from rlhf.rollout.engines import Samples
from rlhf.rollout.experience import Experience, reply_tensors
from rlhf.rollout.rewards import CombinedReward


@torch.no_grad()
def score(
    samples: Samples,
    asked: Sequence[PromptExample],
    micro_batches: Sequence[tuple[Sequence[int], float]],
    policy: nn.Module,
    reference: Reference | None,
    reward: CombinedReward,
    temperature: float,
    pad_id: int,
) -> Experience:
    """Recomputes log-probabilities and values with the forward of the update, row by row in the given micro-batches.

    They are recomputed because a decode with a KV cache is not bitwise a forward over the whole reply: only numbers from the
    same micro-batches through the same forward make the first ratio of an update exactly 1. A micro-batch of weight 0 is one
    that only other ranks have: it is computed along with them.
    """
    tokens, mask, sampled = reply_tensors(samples, pad_id)
    device, scored = next(policy.parameters()).device, reward(samples, asked)
    experience = Experience(
        prompts=samples.prompts,
        tokens=tokens,
        mask=mask,
        finished=torch.tensor(samples.finished),
        sampled_logprobs=sampled,
        logprobs=_blank(policy, mask),
        values=_blank(policy, mask),
        reference_logprobs=None if reference is None else _blank(policy, mask),
        scores=scored.scores,
        kept=scored.kept,
        components=scored.components,
    )
    for rows, weight in micro_batches:
        part = experience.rows(rows)
        batch = part.batch().to(device)
        output = policy(batch, temperature=temperature)
        thought = None if reference is None else reference.logprobs(batch, temperature)
        if not weight:
            continue
        _put(experience.logprobs, rows, part.spread(output.logprobs.cpu()))
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
