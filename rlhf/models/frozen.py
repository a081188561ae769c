"""The lower part of a model, its embeddings and lowest layers: frozen, and in memory once for all roles that have the same."""

from __future__ import annotations

import torch
from torch import nn

from rlhf.errors import DataError


def lower_part(model: nn.Module, count: int) -> dict[str, nn.Module]:
    """The embeddings and the `count` lowest transformer layers, by their places, which all models of an architecture share.

    Raises:
        DataError: the model has fewer layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    stacks = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList) and len(each) == wanted]
    if count > wanted or not stacks:
        raise DataError(f"frozen_layers {count}: the model has {wanted if stacks else 'no stack of'} transformer layers")
    place, layers = stacks[0]  # the outermost: a layer may hold as many experts as there are layers
    embeddings = {
        name: each
        for name, each in model.named_modules()
        if isinstance(each, nn.Embedding) and not name.startswith(f"{place}.")
    }
    return embeddings | {f"{place}.{index}": layers[index] for index in range(count)}


def freeze_lower(model: nn.Module, count: int) -> None:
    """A head that is tied to the embeddings is frozen with them."""
    for part in lower_part(model, count).values() if count else ():
        part.requires_grad_(False)


def share_lower(model: nn.Module, owner: nn.Module, count: int) -> bool:
    """Puts the owner's lower part in place of the model's if they are equal to the bit; says whether they are."""
    own, shared = lower_part(model, count), lower_part(owner, count)
    if own.keys() != shared.keys() or not all(_equal(own[place], shared[place]) for place in own):
        return False
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    for place, part in shared.items():
        if isinstance(head, nn.Linear) and head.weight is getattr(own[place], "weight", None):
            head.weight = part.weight  # pyright: ignore[reportAttributeAccessIssue]
        model.set_submodule(place, part)
    return True


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
