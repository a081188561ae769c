"""Engines turn prompts into replies. An engine knows no reward, no reference and no trainer.

`sync` hands it weights and their version, `generate` samples from them; scoring is a separate step over `Samples`
(scoring.py), so engines are interchangeable. The native one is here; hf_engine.py has transformers' `generate`,
vllm_engine.py a vLLM server.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import torch
from torch import nn

from rlhf.config.policies import Rollout
from rlhf.models.actor_critic import unwrapped
from rlhf.rollout.cache import why_in_batches
from rlhf.rollout.decoding import Reply, Step, complete
from rlhf.rollout.sampling import Sampling

Gather = Callable[[nn.Module], AbstractContextManager[Any]]
"""Yields the plain module inside whatever the training engine wrapped, its weights whole for the time of the context."""


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

    def rows(self, indices: Sequence[int]) -> Samples:
        prompts, responses, logprobs, finished = ([column[row] for row in indices] for column in self._columns())
        return Samples(prompts, responses, logprobs, finished, self.version)

    @classmethod
    def joined(cls, parts: Sequence[Samples]) -> Samples:
        """One after the other."""
        columns = zip(*(part._columns() for part in parts), strict=True)
        prompts, responses, logprobs, finished = (list(chain.from_iterable(column)) for column in columns)
        return cls(prompts, responses, logprobs, finished, parts[0].version)

    def _columns(self) -> tuple[list[Any], ...]:
        return self.prompts, self.responses, self.logprobs, self.finished


class Engine(Protocol):
    """All ranks call `sync` and `generate` together, each with prompts of its own."""

    def sync(self, weights: nn.Module, version: int) -> None: ...

    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples:
        """One reply to each prompt, in the order given."""
        ...


class Run(Protocol):
    """What an engine needs of the run that it samples for."""

    @property
    def is_main(self) -> bool: ...

    @property
    def device(self) -> torch.device: ...

    def gathered(self, model: nn.Module) -> AbstractContextManager[Any]: ...

    def wait_for_main(self) -> None: ...

    def note(self, text: str) -> None: ...


def open_engine(config: Rollout, run: Run, stop_ids: Sequence[int], pad_id: int) -> Engine:
    """The engine that `rollout.engine` names.

    Raises:
        ConfigError: what vLLM needs is not here, or its server does not answer.
    """
    if config.engine == "vllm":
        from rlhf.rollout.vllm_engine import VllmEngine, connected  # imports TRL, and with it vLLM

        return VllmEngine(connected(config.server, run), run, stop_ids, config.generation_batch_size)
    if config.engine == "hf":
        from rlhf.rollout.hf_engine import HfEngine  # needs `Samples` of this file

        return HfEngine(run.gathered, stop_ids, pad_id, config.generation_batch_size)
    return NativeEngine(run.gathered, stop_ids, pad_id, config.generation_batch_size, run.note)


class NativeEngine:
    """Samples from the very module that is trained, with a KV cache; a row that has ended makes room for a waiting prompt."""

    def __init__(
        self,
        gather: Gather,
        stop_ids: Sequence[int],
        pad_id: int,
        slots: int,
        note: Callable[[str], None] = lambda _: None,
        steps: Sequence[Step] = (),
        told: Callable[[Reply], None] | None = None,
    ) -> None:
        """`slots`: rows sampled at a time; `note` is told, once, if rows cannot come and go; `steps`, `told`: of `complete`."""
        self.gather, self.stop_ids, self.pad_id, self.slots = gather, frozenset(stop_ids), pad_id, slots
        self.steps, self.told = steps, told
        self.weights, self.version = None, -1
        self.note: Callable[[str], None] | None = note

    def sync(self, weights: nn.Module, version: int) -> None:
        """Nothing is copied: the module is the one in training."""
        self.weights, self.version = weights, version

    @torch.no_grad()
    def generate(self, prompts: Sequence[list[int]], sampling: Sampling, row_seeds: Sequence[int]) -> Samples:
        assert self.weights is not None, "sync comes before generate"
        replies = [Reply(prompt, seed) for prompt, seed in zip(prompts, row_seeds, strict=True)]
        with self.gather(self.weights) as policy:
            self._tell(unwrapped(policy.actor))
            policy.eval()  # in training mode transformers drops the cache when it checkpoints gradients
            complete(policy.actor, replies, sampling, self.stop_ids, self.pad_id, self.slots, self.steps, self.told)
            policy.train()
        responses = [reply.tokens for reply in replies]
        finished = [response[-1] in self.stop_ids for response in responses]
        return Samples(list(prompts), responses, [reply.logprobs for reply in replies], finished, self.version)

    def _tell(self, model: nn.Module) -> None:
        if self.note is not None and (why := why_in_batches(model)):
            self.note(f"sampling: {type(model).__name__}: {why}, so prompts wait until all replies of a batch have ended")
        self.note = None
