"""What an iteration of PPO learns from: replies, what the policies thought of them, and what they were worth.

Shapes: B replies, T tokens of the longest reply. Replies are right-padded; `mask` marks their real tokens. Prompts stay ragged,
so that every micro-batch is cut to its own longest prompt and reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.data.collate import TokenBatch, pad, token_batch
from rlhf.rollout.engines import Samples


@dataclass(frozen=True)
class Experience:
    prompts: list[list[int]]
    tokens: Tensor
    """(B, T) token ids of the replies"""
    mask: Tensor
    """(B, T) 1 at real tokens of the reply, its EOS included"""
    finished: Tensor
    """(B,) whether the reply ended by itself"""
    sampled_logprobs: Tensor
    """(B, T) log pi(token) as the rollout engine saw it"""
    logprobs: Tensor
    """(B, T) log pi_old(token), recomputed by the forward pass the update uses"""
    values: Tensor
    """(B, T) V_old of the state before the token"""
    reference_logprobs: Tensor | None
    """(B, T) log pi_ref(token); None where the KL penalty is off"""
    scores: Tensor
    """(B,) the reward source's score of each reply, as it came"""
    rewards: Tensor | None = None
    """(B, T) per token: KL penalty, and the score on the last token"""
    advantages: Tensor | None = None
    """(B, T)"""
    returns: Tensor | None = None
    """(B, T)"""

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, indices: Sequence[int]) -> Experience:
        """Some replies, cut to the longest of them."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        longest = int(self.mask[index].sum(1).max())
        changes = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                changes[field.name] = value[index, :longest] if value.ndim == 2 else value[index]
        return replace(self, prompts=[self.prompts[i] for i in index.tolist()], **changes)

    def batch(self, pad_id: int) -> TokenBatch:
        """Prompts padded at the left, replies at the right; heads run where a reply's tokens are predicted."""
        return reply_batch(self.prompts, self.tokens, self.mask, pad_id)

    def to(self, device: torch.device) -> Experience:
        """The same on a device; prompts stay where they are."""
        tensors = {f.name: v.to(device) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, **tensors)

    def masked(self) -> Experience:
        """The same shapes with no token that counts: what a rank computes when others have more rows."""
        return replace(self, mask=torch.zeros_like(self.mask))


def reply_batch(prompts: Sequence[list[int]], tokens: Tensor, mask: Tensor, pad_id: int) -> TokenBatch:
    prompt_ids, prompt_mask = pad(prompts, pad_id, left=True)
    # The position before a reply's first token predicts it, hence one more position than tokens.
    return token_batch(torch.cat([prompt_ids, tokens], 1), torch.cat([prompt_mask, mask], 1), keep=tokens.shape[1] + 1)


def reply_tensors(samples: Samples, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """(tokens, mask, sampled log-probabilities), each (B, T)."""
    tokens, mask = pad(samples.responses, pad_id)
    logprobs = torch.zeros(mask.shape)
    for row, values in enumerate(samples.logprobs):
        logprobs[row, : len(values)] = torch.tensor(values)
    return tokens, mask, logprobs


def concatenate(parts: Sequence[Experience], order: Sequence[int]) -> Experience:
    """Joins experience of several ranks and puts row i of the whole at place order[i]."""
    longest = max(part.tokens.shape[1] for part in parts)
    index = torch.empty(len(order), dtype=torch.long)
    index[torch.tensor(list(order))] = torch.arange(len(order))
    changes = {}
    for field in fields(Experience):
        values = [getattr(part, field.name) for part in parts]
        if isinstance(values[0], Tensor):
            joined = torch.cat([F.pad(v, (0, longest - v.shape[1])) if v.ndim == 2 else v for v in values])
            changes[field.name] = joined[index]
    prompts = [prompt for part in parts for prompt in part.prompts]
    return replace(parts[0], prompts=[prompts[i] for i in index.tolist()], **changes)
