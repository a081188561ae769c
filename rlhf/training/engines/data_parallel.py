"""One process, or DDP: every rank holds everything, and gradients are averaged."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rlhf.training.engines import Named, OpenOptimizer
from rlhf.training.optimization import clipped_step, optimizer_tensors, restore_optimizer


class DataParallel:
    divided: frozenset[str] = frozenset()
    offloaded: frozenset[str] = frozenset()
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.name = "ddp" if accelerator.num_processes > 1 else "one process"

    def prepare(self, policy: nn.Module, open_optimizer: OpenOptimizer, max_grad_norm: float) -> nn.Module:
        self.policy, self.max_grad_norm = policy.to(self.accelerator.device), max_grad_norm
        self.optimizer = open_optimizer(policy)
        self.model = self.accelerator.prepare(policy)
        return self.model

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self) -> float:
        return clipped_step(self.optimizer, self.policy, self.max_grad_norm)

    def gathered(self) -> AbstractContextManager[nn.Module]:
        return nullcontext(self.policy)

    def whole(self, parameter: Tensor) -> Tensor:
        return parameter

    @torch.no_grad()
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        parameter.copy_(whole)

    def consolidate(self, keep: bool) -> None: ...

    def optimizer_tensors(self) -> Named:
        yield from optimizer_tensors(self.optimizer).items()

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        restore_optimizer(self.optimizer, tensors)

    def held(self) -> tuple[int, int]:
        return 0, 0
