"""Engines turn prompts into replies. An engine knows no reward, no reference and no trainer.

`sync` hands it weights and their version, `generate` samples from them; scoring is a separate step over `Samples`
(experience.py), so engines are interchangeable. Left out: engines other than the native one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from rlhf.data.collate import pad
from rlhf.functional.masked import position_ids
from rlhf.rollout.sampling import Sampling, sample

Gather = Callable[[nn.Module], AbstractContextManager[Any]]
"""Yields the plain module inside whatever the training engine wrapped, its weights whole for the time of the context."""

DROP_WHEN_FINISHED = 0.25
"""Part of the rows that must have ended before they are taken out: each time copies the cache of the others."""


@dataclass(frozen=True)
class Samples:
    """Replies, row by row; `logprobs` are those the engine sampled with."""

    prompts: list[list[int]]
    responses: list[list[int]]
    logprobs: list[list[float]]
    finished: list[bool]
    """Whether the reply ended by itself; its last token is then a stop token."""
    version: int

    def __len__(self) -> int:
        return len(self.prompts)


class Engine(Protocol):
    def sync(self, weights: nn.Module, version: int) -> None: ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples: ...


class NativeEngine:
    """Batched sampling from the very module that is trained, with a KV cache; rows leave when they have ended."""

    def __init__(self, gather: Gather, stop_ids: Sequence[int], pad_id: int, batch_size: int) -> None:
        self.gather, self.stop_ids, self.pad_id, self.batch_size = (
            gather,
            torch.tensor(list(stop_ids)),
            pad_id,
            batch_size,
        )
        self.weights, self.version = None, -1

    def sync(self, weights: nn.Module, version: int) -> None:
        """Nothing is copied: the module is the one in training."""
        self.weights, self.version = weights, version

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples:
        """One reply to each prompt. Prompts of like length are sampled together; the result keeps the order given."""
        assert self.weights is not None, "sync comes before generate"
        order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        replies: dict[int, tuple[list[int], list[float]]] = {}
        with self.gather(self.weights) as policy:
            policy.eval()  # in training mode transformers drops the cache when it checkpoints gradients
            for start in range(0, len(order), self.batch_size):
                rows = order[start : start + self.batch_size]
                batch = self._batch(policy.actor, [prompts[row] for row in rows], sampling, [row_seeds[row] for row in rows])
                replies.update(zip(rows, batch, strict=True))
            policy.train()
        responses = [replies[row][0] for row in range(len(prompts))]
        stops = set(self.stop_ids.tolist())
        finished = [response[-1] in stops for response in responses]
        return Samples(list(prompts), responses, [replies[row][1] for row in range(len(prompts))], finished, self.version)

    def _batch(
        self, actor: nn.Module, prompts: list[list[int]], sampling: Sampling, row_seeds: list[int]
    ) -> list[tuple[list[int], list[float]]]:
        device = next(actor.parameters()).device
        ids, mask = (tensor.to(device) for tensor in pad(prompts, self.pad_id, left=True))
        stop_ids, seeds = self.stop_ids.to(device), torch.tensor(row_seeds, device=device)
        positions, cache = position_ids(mask), DynamicCache(config=actor.config)  # pyright: ignore[reportArgumentType]
        rows, ended = (
            torch.arange(len(prompts), device=device),
            torch.zeros(len(prompts), dtype=torch.bool, device=device),
        )
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for place in range(sampling.max_new_tokens):
            logits = actor(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens, logprobs = sample(logits, sampling, seeds, place)
            steps.append((rows, ~ended, tokens, logprobs))
            ended = ended | torch.isin(tokens, stop_ids)
            if bool(ended.all()):
                break
            mask, positions, ids = (
                torch.cat([mask, mask.new_ones(len(rows), 1)], 1),
                positions[:, -1:] + 1,
                tokens[:, None],
            )
            if ended.float().mean() >= DROP_WHEN_FINISHED:
                stay = torch.nonzero(~ended).squeeze(1)
                cache.batch_select_indices(stay)
                rows, mask, positions, ids, seeds, ended = (x[stay] for x in (rows, mask, positions, ids, seeds, ended))
        return _collect(steps, len(prompts))


def _collect(steps: list[tuple[Tensor, Tensor, Tensor, Tensor]], count: int) -> list[tuple[list[int], list[float]]]:
    replies: list[tuple[list[int], list[float]]] = [([], []) for _ in range(count)]
    for rows, live, tokens, logprobs in steps:
        for row, alive, token, logprob in zip(rows.tolist(), live.tolist(), tokens.tolist(), logprobs.tolist(), strict=True):
            if alive:
                replies[row][0].append(token)
                replies[row][1].append(logprob)
    return replies
