"""A module without its weights, and weights into it: how parameters that ranks divide become a plain module.

`whole` puts a parameter together, and all ranks call it, whether or not they have a use for the result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Whole = Callable[[Tensor], Tensor]


def hollow_copy(model: nn.Module) -> nn.Module:
    """The same module with parameters that have a shape and no storage. Buffers are those of the model itself."""
    hollow = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, {**hollow, **{id(buffer): buffer for buffer in model.buffers()}})


@contextmanager
def filled_actor(plain: Any, policy: Any, whole: Whole) -> Iterator[nn.Module]:
    """A hollow copy of a policy, its actor with weights for a while: that is all a rollout needs."""
    hollow = dict(plain.actor.named_parameters())
    weights = {name: nn.Parameter(whole(p), requires_grad=p.requires_grad) for name, p in policy.actor.named_parameters()}
    _put(plain.actor, {id(hollow[name]): weights[name] for name in hollow})
    try:
        yield plain
    finally:
        _put(plain.actor, {id(weights[name]): hollow[name] for name in hollow})


def consolidate(model: nn.Module, whole: Whole, keep: bool) -> None:
    """The model's own parameters become whole, on the host; without `keep`, empty."""
    weights = {}
    for parameter in model.parameters():
        value = whole(parameter)
        weights[id(parameter)] = nn.Parameter(value.cpu() if keep else torch.empty(0), requires_grad=parameter.requires_grad)
    _put(model, weights)


def _put(model: nn.Module, parameters: Mapping[int, Tensor]) -> None:
    """Every parameter gives way to the one that stands under its `id`; what was shared stays shared."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, parameters[id(parameter)])
