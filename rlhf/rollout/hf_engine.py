"""transformers' `generate`, which knows every architecture transformers does, drawing tokens as the native engine draws them.

`generate` would draw from one global stream, so that a reply would hang on the rows beside it. Here each token is chosen by
the project's own `sample`, inside a logits processor that leaves nothing else to choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from rlhf.data.order import chunks
from rlhf.models.actor_critic import unwrapped
from rlhf.rollout.engines import Gather, Samples
from rlhf.rollout.sampling import Sampling, sample


class HfEngine:
    """Samples from the very module that is trained; a batch of rows goes on until the last of them has ended."""

    def __init__(self, gather: Gather, stop_ids: Sequence[int], pad_id: int, slots: int) -> None:
        """`slots`: rows sampled at a time."""
        self.gather, self.stop_ids, self.pad_id, self.slots = gather, frozenset(stop_ids), pad_id, slots
        self.weights, self.version = None, -1

    def sync(self, weights: nn.Module, version: int) -> None:
        """Nothing is copied: the module is the one in training."""
        self.weights, self.version = weights, version

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples:
        assert self.weights is not None, "sync comes before generate"
        responses: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        by_length = sorted(range(len(prompts)), key=lambda row: len(prompts[row]))
        with self.gather(self.weights) as policy, _settings(unwrapped(policy.actor), self._config(sampling)) as model:
            policy.eval()  # in training mode transformers drops the cache when it checkpoints gradients
            for rows in chunks(by_length, self.slots):
                drawn = self._batch(model, [prompts[row] for row in rows], sampling, [row_seeds[row] for row in rows])
                for row, tokens, values in zip(rows, *drawn, strict=True):
                    responses[row], logprobs[row] = tokens, values
            policy.train()
        finished = [response[-1] in self.stop_ids for response in responses]
        return Samples(list(prompts), responses, logprobs, finished, self.version)

    def _config(self, sampling: Sampling) -> GenerationConfig:
        stop_ids: Any = sorted(self.stop_ids) or None
        return GenerationConfig(
            do_sample=False, max_new_tokens=sampling.max_new_tokens, eos_token_id=stop_ids, pad_token_id=self.pad_id
        )

    def _batch(
        self, model: Any, prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Tokens of each row, up to its first stop token, and their log-probabilities."""
        longest = max(map(len, prompts))
        ids = torch.tensor([[self.pad_id] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
        places = torch.arange(longest, device=model.device)
        starts = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=model.device)
        draws = Draws(sampling, torch.tensor(seeds, device=model.device))
        model.generate(
            ids,
            attention_mask=(places >= starts).long(),
            generation_config=model.generation_config,
            logits_processor=LogitsProcessorList([draws]),
        )
        tokens, logprobs = torch.stack(draws.tokens, 1).tolist(), torch.stack(draws.logprobs, 1).tolist()
        lengths = [next((i + 1 for i, token in enumerate(row) if token in self.stop_ids), len(row)) for row in tokens]
        cut = [[row[:length] for row, length in zip(of, lengths, strict=True)] for of in (tokens, logprobs)]
        return cut[0], cut[1]


class Draws(LogitsProcessor):
    """Draws a token of each row and leaves it as the only one possible."""

    def __init__(self, sampling: Sampling, seeds: Tensor) -> None:
        self.sampling, self.seeds = sampling, seeds
        self.tokens: list[Tensor] = []
        """(rows,) of each step; of a row that has ended, what nobody asks for"""
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        tokens, logprobs = sample(scores, self.sampling, self.seeds, len(self.tokens))
        self.tokens.append(tokens)
        self.logprobs.append(logprobs)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@contextmanager
def _settings(model: Any, config: GenerationConfig) -> Iterator[Any]:
    """`generate` fills in what a config leaves open from the model's own (a repetition penalty, say): here that is the same."""
    own, model.generation_config = model.generation_config, config
    try:
        yield model
    finally:
        model.generation_config = own
