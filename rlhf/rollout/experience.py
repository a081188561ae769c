"""What an iteration of PPO learns from: replies, what the policies thought of them, and what they were worth.

Shapes: B replies, T tokens of the longest reply. What is known of replies is right-padded, for the formulas, and `mask`
marks their real tokens; what a model is given has no pads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from rlhf.data.collate import TokenBatch, pad, reply_row, token_batch
from rlhf.functional.masked import Aggregation, token_weights
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
    values: Tensor | None
    """(B, T) V_old of the state before the token; None where there is no critic"""
    reference_logprobs: Tensor | None
    """(B, T) log pi_ref(token); None where the KL penalty is off"""
    scores: Tensor
    """(B,) the score of each reply, as its sources gave it; NaN where they have none"""
    rewards: Tensor | None = None
    """(B, T) per token: KL penalty, and the score on the last token"""
    advantages: Tensor | None = None
    """(B, T)"""
    returns: Tensor | None = None
    """(B, T)"""
    weights: Tensor | None = None
    """(B, T) of each token in the loss of a minibatch"""
    kept: Tensor | None = None
    """(B,) whether a reply has a score; None: all have. Nothing is learned from one without"""
    components: dict[str, Tensor] = field(default_factory=dict)
    """(B,) the scores of each of several sources, by name, as they came; NaN for none"""

    @property
    def scored(self) -> Tensor:
        """(B,) `kept`, whatever it is."""
        return torch.ones(len(self), dtype=torch.bool, device=self.mask.device) if self.kept is None else self.kept

    @property
    def learned(self) -> Tensor:
        """(B, T) 1 at the tokens that a loss, a mean or a moment is taken of: those of replies that have a score."""
        return self.mask * self.scored.unsqueeze(1)

    def __len__(self) -> int:
        return len(self.prompts)

    def rows(self, indices: Sequence[int]) -> Experience:
        """Some replies, cut to the longest of them."""
        index = torch.as_tensor(list(indices), dtype=torch.long)
        longest = int(self.mask[index].sum(1).max())
        found = self._each(lambda value: value[index, :longest] if value.ndim == 2 else value[index])
        return replace(found, prompts=[self.prompts[i] for i in index.tolist()])

    def weighed(self, minibatch: Sequence[int], aggregation: Aggregation, longest: int) -> Experience:
        """With the weight that each token has in the loss of some of the replies; `longest`: tokens, of `constant`."""
        weights = torch.zeros_like(self.logprobs)
        index = torch.as_tensor(list(minibatch))
        weights[index] = token_weights(self.learned[index], aggregation, longest, weights.dtype)
        return replace(self, weights=weights)

    def batch(self) -> TokenBatch:
        """Read where a reply's tokens are predicted; on the device of the experience."""
        rows = (reply_row(prompt, reply) for prompt, reply in zip(self.prompts, self.replies, strict=True))
        return token_batch(rows).to(self.mask.device)

    @property
    def replies(self) -> list[list[int]]:
        """Token ids, no pads."""
        return [tokens[:length] for tokens, length in zip(self.tokens.tolist(), self.mask.sum(1).tolist(), strict=True)]

    def spread(self, values: Tensor) -> Tensor:
        """(B, T) from one number for each token of `batch`, 0 where no token is."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask.bool(), values)

    def to(self, device: torch.device) -> Experience:
        """The same on a device; prompts stay where they are."""
        return self._each(lambda value: value.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Experience:
        """The same with every tensor changed."""
        tensors = {f.name: change(v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        return replace(self, components={name: change(v) for name, v in self.components.items()}, **tensors)


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
    for name in (one.name for one in fields(Experience)):
        values = [getattr(part, name) for part in parts]
        if isinstance(values[0], Tensor):
            joined = torch.cat([F.pad(v, (0, longest - v.shape[1])) if v.ndim == 2 else v for v in values])
            changes[name] = joined[index]
    changes["components"] = {name: torch.cat([part.components[name] for part in parts])[index] for name in parts[0].components}
    prompts = [prompt for part in parts for prompt in part.prompts]
    return replace(parts[0], prompts=[prompts[i] for i in index.tolist()], **changes)
