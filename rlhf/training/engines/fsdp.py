"""FSDP2: torch's `fully_shard` divides weights, gradients and optimizer state among the ranks, layer by layer.

torch's own function, and not accelerate's wrapper around it, because that one leaves the weights whole on a CPU and says
nothing (accelerate 1.15): this way a CPU test runs what a GPU runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.training.engines import Named, OpenOptimizer
from rlhf.training.engines.hollow import consolidate, filled_actor, hollow_copy
from rlhf.training.optimization import MOMENTS, clipped_step, optimizer_tensors, restore_optimizer


class FullyShardedDataParallel:
    name = "fsdp"
    divided = frozenset({"weights", "gradients", "optimizer"})
    offloaded: frozenset[str] = frozenset()
    optimizer: torch.optim.Optimizer

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator

    def prepare(self, policy: nn.Module, open_optimizer: OpenOptimizer, max_grad_norm: float) -> nn.Module:
        self.plain, self.max_grad_norm = hollow_copy(policy), max_grad_norm
        self.policy = self._sharded(policy)
        self.optimizer = open_optimizer(self.policy)  # over the shards
        return self.policy

    def prepare_frozen(self, model: nn.Module) -> nn.Module:
        return self._sharded(model)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()  # every backward exchanges: whole gradients, kept until the last, are what there is no room for

    def backward(self, loss: Tensor) -> None:
        self.accelerator.backward(loss)

    def step(self) -> float:
        return clipped_step(self.optimizer, self.policy, self.max_grad_norm)

    def gathered(self) -> AbstractContextManager[nn.Module]:
        return filled_actor(self.plain, self.policy, self.whole)

    def whole(self, parameter: Tensor) -> Tensor:
        return _whole(parameter.detach())

    @torch.no_grad()
    def put(self, parameter: Tensor, whole: Tensor) -> None:
        if isinstance(parameter, DTensor):
            whole = distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)
        parameter.copy_(whole)

    def consolidate(self, keep: bool) -> None:
        consolidate(self.policy, self.whole, keep)

    def optimizer_tensors(self) -> Named:
        for name, tensor in optimizer_tensors(self.optimizer).items():
            yield name, _whole(tensor)

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        shards = dict(tensors)
        for name, parameter in self.policy.named_parameters():
            for key in MOMENTS:
                if (full := tensors.get(f"{name}.{key}")) is not None:
                    like = cast(DTensor, parameter)
                    shards[f"{name}.{key}"] = distribute_tensor(full.to(like.device), like.device_mesh, like.placements)
        restore_optimizer(self.optimizer, shards)

    def held(self) -> tuple[int, int]:
        parameters = [p for p in self.policy.parameters() if isinstance(p, DTensor)]
        return sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in self.policy.parameters())

    def _sharded(self, model: nn.Module) -> nn.Module:
        """In place, each transformer layer by itself, what is left (embeddings, norms, heads) together."""
        # For bf16, where asked for. Weights stay on the host until they are divided: on a device the whole may have no room.
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        for layer in [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]:
            fully_shard(layer)
        fully_shard(model, reshard_after_forward=True)  # the root, too: who looks at its parameters always sees the shards
        return model


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
