"""The lower part of a model, its embeddings and lowest layers: frozen, and in memory once for all roles that have the same.

What it makes of a row is then the same for all of them and in every epoch, so it is computed once an iteration and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.sections import FrozenCache
from rlhf.data.collate import TokenBatch
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


def lower_layers(model: nn.Module, count: int) -> list[nn.Module]:
    """The `count` lowest transformer layers."""
    return [part for part in lower_part(model, count).values() if not isinstance(part, nn.Embedding)]


def freeze_lower(model: nn.Module, count: int) -> None:
    """A head that is tied to the embeddings is frozen with them."""
    for part in lower_part(model, count).values() if count else ():
        part.requires_grad_(False)


def share_lower(model: nn.Module, owner: nn.Module, count: int) -> bool:
    """Puts the owner's lower part in place of the model's if they are equal to the bit; says whether they are."""
    own, shared = lower_part(model, count), lower_part(owner, count)
    if own.keys() != shared.keys() or not all(_equal(own[place], shared[place]) for place in own):
        return False
    place_lower(model, own, shared)
    return True


def place_lower(model: nn.Module, own: Mapping[str, nn.Module], shared: Mapping[str, nn.Module]) -> None:
    """Puts parts, by their places, where the model has its own."""
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    for place, part in shared.items():
        if isinstance(head, nn.Linear) and head.weight is getattr(own[place], "weight", None):
            head.weight = part.weight  # pyright: ignore[reportAttributeAccessIssue]
        model.set_submodule(place, part)


def _equal(one: nn.Module, other: nn.Module) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


Key = tuple[tuple[int, ...], tuple[int, ...]]
"""(tokens before a segment, its own): on these alone depends what frozen layers make of it."""


def forget_rows(*models: nn.Module) -> None:
    """At the start of an iteration: rows that come again were computed among others, which a resumed run does not know."""
    for part in (part for model in models for part in model.modules()):
        for lower in getattr(part, "lower", {}).values():
            lower.forget()


class FrozenLower:
    """Frozen layers that roles have in common, with what they made of the rows since `forget`.

    A batch is computed whole, or not at all: if any of its segments is unknown. What was computed in one batch is equal to the
    bit to computing that batch again; to computing the row among others, but for what a product's rounding owes to its size.
    """

    def __init__(self, layers: Sequence[nn.Module], cache: FrozenCache) -> None:
        self.layers, self.cache, self.limit_bytes = layers, cache, cache.limit_mib * 2**20
        self.kept: dict[Key, Tensor] = {}
        self.kept_bytes = 0
        self.dtype: torch.dtype | None = None
        """Of the activations as they were computed."""

    def forget(self) -> None:
        self.kept, self.kept_bytes = {}, 0

    @contextmanager
    def applied(self, batch: TokenBatch) -> Iterator[None]:
        """Around a pass through a trunk that has the layers: they give what is known of the batch, or it becomes known."""
        keys = [
            (() if segment.parent is None else batch.tokens[segment.parent], own)
            for segment, own in zip(batch.segments, batch.tokens, strict=True)
        ]
        with ExitStack() as undo:
            if all(key in self.kept for key in keys):
                known = torch.cat([self.kept[key] for key in keys])[None].to(batch.ids.device, self.dtype)
                for layer in self.layers:
                    layer.forward = lambda *_, **__: known
                    undo.callback(delattr, layer, "forward")
            else:
                hook = self.layers[-1].register_forward_hook(lambda _, __, output: self._keep(output, keys, batch))
                undo.callback(hook.remove)
            yield

    def _keep(self, output: Any, keys: Sequence[Key], batch: TokenBatch) -> Any:
        """What the layers above get is what they get the next time: what is known already, and what is kept of the rest."""
        self.dtype, parts = output.dtype, []
        for key, (start, length, _) in zip(keys, batch.segments, strict=True):
            part = self.kept.get(key)
            if part is None:
                part = output[0, start : start + length].detach()
                part = part.to(
                    "cpu" if self.cache.place == "host" else part.device,
                    torch.bfloat16 if self.cache.dtype == "bf16" else part.dtype,
                    copy=True,
                )
                if self.kept_bytes + part.nbytes <= self.limit_bytes:
                    self.kept[key] = part
                    self.kept_bytes += part.nbytes
            parts.append(part)
        return torch.cat(parts)[None].to(output.device, output.dtype)
