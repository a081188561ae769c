"""What holds the trained weights while a stage runs: one process or DDP, DeepSpeed's ZeRO, or FSDP2, behind the same few verbs.

Which one is the launch file's to say (`distributed_type: MULTI_GPU | DEEPSPEED | FSDP`); a stage never asks. Losses, schedules,
clipping, data order and checkpoints are the session's, and so the same under all of them: a checkpoint holds whole tensors by
name, whoever trained them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

OpenOptimizer = Callable[[nn.Module], torch.optim.Optimizer]
Named = Iterator[tuple[str, Tensor]]


class Engine(Protocol):
    """All ranks call every verb together, but for what is said of `backward` and of the module that `gathered` yields."""

    name: str
    divided: frozenset[str]
    """What ranks divide among them, of `weights`, `gradients` and `optimizer`; of all else every rank has the whole."""
    offloaded: frozenset[str]
    """What of these lies in the host's memory and not on the device."""
    optimizer: torch.optim.Optimizer
    """Its groups keep `role`, `lr` and `peak`; which tensors they hold is the engine's affair."""

    def prepare(self, policy: nn.Module, open_optimizer: OpenOptimizer, max_grad_norm: float) -> nn.Module:
        """Takes the model over; its forward is called through what comes back."""
        ...

    def prepare_frozen(self, model: nn.Module) -> nn.Module: ...

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch: gradients must be those of all ranks after the last one only."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients, which are means over ranks."""
        ...

    def step(self) -> float:
        """Clips, steps and clears the gradients. Returns their norm before it; where that is not finite nothing was stepped."""
        ...

    def gathered(self) -> AbstractContextManager[nn.Module]:
        """The plain policy with whole weights, to sample from: its forwards wait for no other rank."""
        ...

    def whole(self, parameter: Tensor) -> Tensor:
        """A parameter of a prepared model, put together from what the ranks hold of it; to be read only."""
        ...

    def put(self, parameter: Tensor, whole: Tensor) -> None:
        """Gives a parameter of a prepared model, trained or frozen, a value that every rank has whole."""
        ...

    def consolidate(self, keep: bool) -> None:
        """Training is over: whole weights go into the plain policy; without `keep`, nowhere."""
        ...

    def optimizer_tensors(self) -> Named:
        """AdamW's state, whole, by `parameter.state` names."""
        ...

    def restore_optimizer(self, tensors: Mapping[str, Tensor]) -> None: ...

    def held(self) -> tuple[int, int]:
        """Of the elements that ranks should divide among them: how many this one holds, and how many there are."""
        ...
