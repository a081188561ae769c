"""KV caches for sampling: one whose rows come and go, and transformers' own for models that keep more than keys and values.

In a `SlotCache` every row ends at the same column, where the next token of all is written; a row begins as many columns
before as it has tokens. To the model that is a batch padded at the left, which every family understands. transformers'
DynamicCache copies the whole of itself at each token (`torch.cat`), and its rows all begin together.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from rlhf.errors import DataError

ROOM = 16
"""Columns, or an eighth of those in use, kept free for tokens to come. More would save copies, which are rare already, and
cost time at every token: attention is bound by memory, which it reads slower across a gap behind each row."""


@dataclass
class Live:
    """What all layers of a cache have in common."""

    rows: int = 0
    width: int = 0
    """Tokens of the longest row"""


class SlotLayer(CacheLayerMixin):
    """Keys and values (slots, heads, columns, dim), written in place; live rows are the first ones."""

    keys: Tensor
    values: Tensor

    def __init__(self, live: Live, slots: int, longest_reply: int, window: int | None) -> None:
        super().__init__()
        self.live, self.slots, self.longest_reply, self.window = live, slots, longest_reply, window
        self.is_sliding, self.end = window is not None, 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """One token (rows, heads, 1, dim) after those of each live row; views of all that the token may attend to."""
        seen = self._seen()
        if self.end == self.keys.shape[2]:
            self._move(seen)
        rows, place, shown = slice(self.live.rows), self.end, slice(self.end - seen, self.end + 1)
        self.keys[rows, :, place : place + 1] = key_states
        self.values[rows, :, place : place + 1] = value_states
        self.end += 1
        return self.keys[rows, :, shown], self.values[rows, :, shown]

    def join(self, keys: Tensor, values: Tensor) -> None:
        """New rows (rows, heads, tokens, dim) after the live ones."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        rows, length = slice(self.live.rows, self.live.rows + len(keys)), keys.shape[2]
        if length > self.end:
            self._move(length)
        longer = max(0, length - self._seen())
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[rows, :, self.end - length : self.end] = new
            # Columns before a row's first are masked, but a mask does not silence a NaN that happened to lie there.
            kept[rows, :, max(0, self.end - self._seen()) : self.end - length] = 0
            kept[: self.live.rows, :, self.end - length : self.end - length + longer] = 0

    def keep(self, new: Tensor, old: Tensor) -> None:
        """Row `old` takes the slot `new`, one by one."""
        shown = slice(self.end - self._seen(), self.end)
        for kept in (self.keys, self.values):
            kept[new, :, shown] = kept[old, :, shown]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (_empty(states, self.slots) for states in (key_states, value_states))
        self.is_initialized = True

    def _move(self, before: int) -> None:
        """What live rows need goes into new tensors, to end at column `before`, with free columns after it."""
        seen = self._seen()
        columns = before + min(self.longest_reply, max(ROOM, before // 8))
        for name in ("keys", "values"):
            old: Tensor = getattr(self, name)
            new = old.new_empty(self.slots, old.shape[1], columns, old.shape[3])
            new[: self.live.rows, :, before - seen : before] = old[: self.live.rows, :, self.end - seen : self.end]
            setattr(self, name, new)
        self.end = before

    def _seen(self) -> int:
        """Columns, before its own, that the next token attends to."""
        return self.live.width if self.window is None else min(self.live.width, self.window - 1)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._seen() + query_length, self.live.width - self._seen()

    def get_seq_length(self) -> int:
        return self.live.width

    def get_max_length(self) -> int:
        return -1


def _empty(states: Tensor, slots: int) -> Tensor:
    """No column yet. Attention under autocast casts its inputs: cast once when written, not the whole at each token."""
    dtype, kind = states.dtype, states.device.type
    if torch.is_autocast_enabled(kind) and dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
    return states.new_zeros(slots, states.shape[1], 0, states.shape[3], dtype=dtype)


class SlotCache(Cache):
    """At most `slots` rows of any lengths, which leave and join one by one."""

    def __init__(self, config: PreTrainedConfig, slots: int, longest_reply: int) -> None:
        self.live, self.slots = Live(), slots
        windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
        super().__init__(layers=[SlotLayer(self.live, slots, longest_reply, window) for window in windows])

    @property
    def width(self) -> int:
        """Columns that the attention mask of the next token has before its own."""
        return self.live.width

    def free(self) -> int:
        return self.slots - self.live.rows

    def join(self, prompts: DynamicCache, count: int, length: int) -> None:
        """`count` rows of `length` tokens each, after the live ones."""
        for layer, filled in zip(self.layers, prompts.layers, strict=True):
            layer.join(filled.keys, filled.values)  # pyright: ignore[reportAttributeAccessIssue]
        self.live.rows, self.live.width = self.live.rows + count, max(self.live.width, length)

    def advance(self) -> None:
        """The rows are longer by a token, now that each layer has it."""
        self.live.width += 1

    def keep(self, order: list[int], longest: int) -> None:
        """Row order[i] becomes row i, the others leave; `longest`: tokens of the longest that stays."""
        moved = [(new, old) for new, old in enumerate(order) if new != old]
        if moved:
            new, old = torch.tensor(moved).T
            for layer in self.layers:
                layer.keep(new, old)  # pyright: ignore[reportAttributeAccessIssue]
        self.live.rows, self.live.width = len(order), longest


class BatchCache(DynamicCache):
    """transformers' own, behind the verbs of `SlotCache`: rows join when all others have left, padded at the left."""

    def __init__(self, config: PreTrainedConfig, slots: int) -> None:
        super().__init__(config=config)
        self.slots, self.rows, self.width = slots, 0, 0

    def free(self) -> int:
        return 0 if self.rows else self.slots

    def join(self, prompts: DynamicCache, count: int, length: int) -> None:
        self.layers, self.rows, self.width = prompts.layers, count, length

    def advance(self) -> None:
        self.width += 1

    def keep(self, order: list[int], longest: int) -> None:
        self.rows = len(order)
        if order:
            self.reorder_cache(torch.tensor(order))  # pyright: ignore[reportArgumentType]


def cache_for(model: Any, slots: int, longest_reply: int) -> SlotCache | BatchCache:
    """Of a `...ForCausalLM`, which may not be wrapped in anything.

    Raises:
        DataError: the model cannot go on from a cache of transformers' at all; it would begin anew at each token.
    """
    if "past_key_values" not in inspect.signature(type(model).forward).parameters:
        name = type(model).__name__
        raise DataError(f"{name}: cannot be sampled from; expected a model whose forward takes `past_key_values`")
    return BatchCache(model.config, slots) if why_in_batches(model) else SlotCache(model.config, slots, longest_reply)


def why_in_batches(model: Any) -> str | None:
    """What a `SlotCache` has no place for: transformers names the kind of cache of every layer, and code from outside it was
    written against DynamicCache. None: it has a place for all."""
    kinds = {type(layer) for layer in DynamicCache(config=model.config).layers} - {DynamicLayer, DynamicSlidingWindowLayer}
    if kinds:
        return f"its layers keep a {', a '.join(sorted(kind.__name__ for kind in kinds))}"
    if model._is_stateful:
        return "it keeps a state beside keys and values"
    if not type(model).__module__.startswith("transformers."):
        return "its code is not of transformers"
    return None
