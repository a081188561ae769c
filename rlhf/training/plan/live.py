"""What is alive while a micro-batch goes through a model: counted on tensors that have shapes, and no memory.

torch's FakeTensorMode runs the very code of a stage, forward and backward, without computing anything, so nothing here knows
what an architecture keeps for its backward pass: a storage is counted from the operator that makes it until the last tensor
that has it is gone. Workspaces inside an operator are not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf.data.collate import Row, token_batch
from rlhf.models.actor_critic import ActorCritic


@dataclass(frozen=True)
class Peak:
    """Bytes beyond those that were alive before."""

    size: float
    logits: float = 0.0
    """Of them, in tensors whose last dimension is the vocabulary."""


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that operators in here make. `vocabulary`: the size that tells logits."""

    def __init__(self, vocabulary: int = 0) -> None:
        super().__init__()
        self.vocabulary, self.now, self.logits, self.peak = vocabulary, 0, 0, Peak(0)
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor):
                self._add(leaf, are_logits=leaf.ndim > 1 and leaf.shape[-1] == self.vocabulary)
        return found

    def add(self, *tensors: Tensor) -> None:
        """Tensors that were there before, and are no logits."""
        for tensor in tensors:
            self._add(tensor, are_logits=False)

    def begin(self) -> None:
        """The peak is counted from here on, over what is alive now."""
        self.start, self.peak = self.now, Peak(0)

    start = 0

    def _add(self, tensor: Tensor, are_logits: bool) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._seen:
            return
        size = storage.nbytes()
        of_logits = size if are_logits else 0

        def gone(_: Any) -> None:
            del self._seen[key]
            self.now, self.logits = self.now - size, self.logits - of_logits

        self._seen[key] = weakref.ref(storage, gone)
        self.now, self.logits = self.now + size, self.logits + of_logits
        if self.now - self.start > self.peak.size:
            self.peak = Peak(self.now - self.start, self.logits)


def passing(
    policy: ActorCritic,
    rows: Sequence[Row],
    *,
    bf16: bool = False,
    backward: int = 0,
    entropy: bool = False,
    divided: bool = False,
    whole_logits: bool = False,
) -> Peak:
    """Of a forward over a micro-batch (without gradients), or of a forward and a backward.

    Args:
        policy: on the meta device, and left there.
        backward: 0: none; 1: gradients come with it; 2: gradients of an earlier micro-batch are there already, and not counted.
        divided: weights are, so that no forward keeps those it has cast to its end (rlhf/training/processes.py).
        whole_logits: as under ZeRO-3, which computes all logits at once.
    """
    with FakeTensorMode():
        taken = _given(policy)
        vocabulary = next((m.config.get_text_config().vocab_size for m in taken.modules() if hasattr(m, "config")), 0)
        live = Live(vocabulary if taken.actor is not None else 0)  # pyright: ignore[reportArgumentType]
        if whole_logits:
            next(taken.parameters()).ds_id = 0  # pyright: ignore[reportAttributeAccessIssue]
        live.add(*taken.parameters(), *taken.buffers())  # or views of them would be new
        with live, torch.set_grad_enabled(backward > 0):
            for _ in range(max(backward, 1)):
                live.begin()
                with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=not divided):
                    output = taken(token_batch(rows), entropy=entropy)
                told = [tensor.float() for tensor in output if tensor is not None]
                if backward:
                    torch.cat(told).sum().backward()
                del output, told
    return live.peak


def _given(model: ActorCritic) -> Any:
    """A copy in which every tensor of the model is a fake one on the CPU; what was shared stays shared."""
    fakes = {id(b): torch.empty(b.shape, dtype=b.dtype) for b in model.buffers()}
    for p in model.parameters():
        fakes[id(p)] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype), requires_grad=p.requires_grad)
    return copy.deepcopy(model, fakes)
