"""Through a model's trunk without pads: the hidden states of a TokenBatch, and from them what the heads say.

Linear layers see the rows as one sequence. Attention is the one place where tokens meet, so it alone knows of rows: each
segment attends to itself and, where it continues a prompt that others share, to that. transformers lets an attention function
of our own take sdpa's place; models and attention implementations it cannot serve are given rows in the form they want.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.data.collate import Segment, TokenBatch
from rlhf.errors import DataError
from rlhf.functional.logprobs import entropy, token_logprobs
from rlhf.models.frozen import FrozenLower, lower_layers

BY_SEGMENTS = "sdpa_by_segments"
"""Name of our attention among transformers' implementations."""

WINDOWED = {"gemma3_text", "mistral", "mixtral", "phi3", "qwen2", "qwen3", "starcoder2"}
"""Kinds of models that hand the width of a sliding window to the attention function."""
BY_ATTENTION_ALONE = WINDOWED | {
    "cohere", "gemma", "glm", "glm4", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "llama", "olmo", "olmo2", "opt", "phi",
    "qwen2_moe", "qwen3_moe", "smollm3",
}  # fmt: skip
"""Kinds whose tokens meet in the attention function and nowhere else, which no flag of transformers tells for sure: some build
masks of their own, some have convolutions or states. Each is compared with plain forwards in tests/models/test_trunk.py."""

LOGITS_AT_ONCE = 2**26
"""Elements, 256 MiB in float32. More are computed in parts, and again in the backward pass: they never exist together."""


@torch.compiler.disable  # its loops are over rows, which no two batches have in common; what is around it is compiled
def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    segments: tuple[Segment, ...] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """(1, S, heads, dim) from query (1, heads, S, dim), key and value. Without `segments`, as when sampling, it is sdpa."""
    if segments is not None and attention_mask is not None:
        raise ValueError(f"{type(module).__name__} has a mask of its own, which segments do not know of")
    if segments is None:
        if _without_mask.get():
            raise ValueError(f"{type(module).__name__} was not handed the segments: rows would see each other")
        window = {} if sliding_window is None else {"sliding_window": sliding_window}
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **window, **kwargs)
    groups = getattr(module, "num_key_value_groups", 1)
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    lengths = {segment.length for segment in segments}
    if len(lengths) == 1 and all(segment.parent is None for segment in segments):
        query, key, value = (x[0].unflatten(1, (len(segments), -1)).transpose(0, 1) for x in (query, key, value))
        return _attend(query, key, value, scaling, sliding_window).transpose(1, 2).flatten(0, 1)[None], None
    parts = [x.split([segment.length for segment in segments], 2) for x in (query, key, value)]
    found = []
    for number, (own_query, own_key, own_value) in enumerate(zip(*parts, strict=True)):
        parent = segments[number].parent
        if parent is not None:
            own_key, own_value = torch.cat([parts[1][parent], own_key], 2), torch.cat([parts[2][parent], own_value], 2)
        found.append(_attend(own_query, own_key, own_value, scaling, sliding_window))
    return torch.cat(found, 2).transpose(1, 2).contiguous(), None


def _attend(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal, the last query beside the last key."""
    asking, seen = query.shape[2], key.shape[2]
    mask = None
    if asking < seen or (window is not None and window < seen):
        mask = torch.ones(asking, seen, dtype=torch.bool, device=query.device).tril(seen - asking)
        if window is not None:
            mask = mask.triu(seen - asking - window + 1)
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=scaling)


_without_mask: ContextVar[bool] = ContextVar("without_mask", default=False)
"""Whether a TokenBatch is going through a trunk: S x S numbers to say what the segments say would be of no use."""


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _without_mask.get() else sdpa_mask(*args, **kwargs)


AttentionInterface.register(BY_SEGMENTS, segment_attention)  # pyright: ignore[reportArgumentType]
AttentionMaskInterface.register(BY_SEGMENTS, _mask)  # pyright: ignore[reportArgumentType]


def attend_by_segments(model: PreTrainedModel) -> None:
    """Puts our attention in place of sdpa, if the model hands all that mixes tokens to the attention function."""
    if takes_one_sequence(model):
        model.set_attn_implementation(BY_SEGMENTS)


def takes_one_sequence(model: PreTrainedModel) -> bool:
    """Whether rows in one sequence can be kept apart by attention."""
    config: Any = model.config
    windows = "sliding_attention" in (getattr(config, "layer_types", None) or ()) or getattr(config, "sliding_window", None)
    return config.model_type in (WINDOWED if windows else BY_ATTENTION_ALONE)


def checkpoint_activations(model: PreTrainedModel, **options: Any) -> None:
    """Layers keep their input alone and compute the rest again in the backward pass; `options` are torch's."""
    options = {"use_reentrant": False, **options}
    if hasattr(model, "activation_checkpointing_enable"):  # since transformers 5.23, which warns of the older name
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def compile_layers(model: PreTrainedModel, frozen: int) -> None:
    """All but the frozen ones, each by itself and for any length: what is compiled is one layer, with and without gradients."""
    for layer in lower_layers(model, model.config.get_text_config().num_hidden_layers)[frozen:]:
        layer.compile(dynamic=True)


class Trunk:
    """One pass of a batch through a model's trunk.

    Args:
        lower: its frozen layers, where they are others' too.
        active: what the model is in while it computes, also when the backward pass has it compute again.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: TokenBatch,
        lower: FrozenLower | None = None,
        active: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.batch, self.active = model, batch, active
        decoder = model.get_decoder()
        self.trunk: Any = decoder if isinstance(decoder, PreTrainedModel) else getattr(model, model.base_model_prefix)
        attention: Any = model.config._attn_implementation
        one_sequence = attention == "flash_attention_2" and takes_one_sequence(model)
        inputs, places = _by_segments(batch) if attention == BY_SEGMENTS else _by_rows(batch, one_sequence)
        with ExitStack() as around:
            around.enter_context(active())
            if attention == BY_SEGMENTS:
                around.callback(_without_mask.reset, _without_mask.set(True))
                around.enter_context(lower.applied(batch) if lower is not None else nullcontext())
            self.output = self.trunk(**inputs, use_cache=False, return_dict=True)
        if "last_hidden_state" not in self.output:
            raise DataError(f"{type(model).__name__} cannot be trained here: its trunk gives {type(self.output).__name__}")
        hidden: Tensor = self.output.last_hidden_state
        self.hidden = hidden.flatten(0, 1)[places]
        """(K, D) what the heads read"""

    def logprobs(self, temperature: float) -> Tensor:
        """(K,) of the batch's targets under the model's own LM head."""
        return self._in_parts(partial(self._logprobs, temperature=temperature))

    def logprobs_and_entropy(self, temperature: float) -> tuple[Tensor, Tensor]:
        """The same, and (K,) the entropy of all tokens at these places."""
        both = self._in_parts(partial(self._logprobs_and_entropy, temperature=temperature))
        return both[:, 0], both[:, 1]

    def _in_parts(self, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """What is read off the logits, which never exist together where there are many."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.get_text_config().vocab_size)
        if hasattr(next(self.model.parameters()), "ds_id"):
            at_once = max(1, len(self.hidden))  # ZeRO-3 gathers a head at each call of it, and ranks read at different numbers
        parts = list(zip(self.hidden.split(at_once), self.batch.targets.split(at_once), strict=True))
        if len(parts) == 1:
            return read(*parts[0])
        return torch.cat([checkpoint(read, *part, use_reentrant=False) for part in parts])  # pyright: ignore

    def _logprobs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return token_logprobs(self._logits(hidden, targets), targets, temperature)

    def _logprobs_and_entropy(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        logits = self._logits(hidden, targets)
        return torch.stack([token_logprobs(logits, targets, temperature), entropy(logits, temperature)], -1)

    def _logits(self, hidden: Tensor, targets: Tensor) -> Tensor:
        # The model's own forward from the trunk's end on: what it does to logits after the head (scale, soft cap) is in it.
        with self.active(), _standing_in(self.trunk, type(self.output)(**{**self.output, "last_hidden_state": hidden[None]})):
            return self.model(input_ids=targets[None], use_cache=False, return_dict=True).logits[0]


@contextmanager
def _standing_in(trunk: nn.Module, output: Any) -> Iterator[None]:
    """In here the trunk gives this output, whatever it is called with."""
    calls, before = [], trunk.__dict__.get("forward")
    trunk.forward = lambda *_, **__: calls.append(1) or output
    try:
        yield
    finally:
        del trunk.forward
        if before is not None:  # some library's own, such as accelerate's
            trunk.forward = before
    if not calls:
        raise DataError(f"the model cannot be trained here: its forward does not call its {type(trunk).__name__}")


def _by_segments(batch: TokenBatch) -> tuple[dict[str, Any], Tensor]:
    """What the trunk is called with, and where in the B x L places of what it returns the heads read."""
    return {"input_ids": batch.ids[None], "position_ids": batch.position_ids[None], "segments": batch.segments}, batch.read


def _by_rows(batch: TokenBatch, one_sequence: bool) -> tuple[dict[str, Any], Tensor]:
    """The same with every row whole: padded, or in one sequence in which position ids that start again tell them apart."""
    rows, places = _rows(batch)
    if one_sequence:
        ids, positions = torch.cat(rows)[None], torch.cat([torch.arange(len(row), device=row.device) for row in rows])[None]
        starts = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
        return {"input_ids": ids, "position_ids": positions}, _flat(places, starts, batch)
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    starts = [row * ids.shape[1] for row in range(len(rows))]
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}, _flat(places, starts, batch)


def _rows(batch: TokenBatch) -> tuple[list[Tensor], list[tuple[int, int]]]:
    """Every row whole, a shared prompt as often as rows begin with it; and of each segment (a row it is in, where in it)."""
    parents = {segment.parent for segment in batch.segments}
    rows, places = [], [(0, 0)] * len(batch.segments)
    for number, (start, length, parent) in enumerate(batch.segments):
        if number in parents:
            continue
        own = batch.ids[start : start + length]
        if parent is None:
            places[number] = len(rows), 0
            rows.append(own)
        else:
            before = batch.segments[parent]
            places[parent], places[number] = (len(rows), 0), (len(rows), before.length)
            rows.append(torch.cat([batch.ids[before.start : before.start + before.length], own]))
    return rows, places


def _flat(places: list[tuple[int, int]], starts: list[int], batch: TokenBatch) -> Tensor:
    where = torch.cat(
        [torch.arange(segment.length) + starts[row] + at for segment, (row, at) in zip(batch.segments, places, strict=True)]
    )
    return where.to(batch.read.device)[batch.read]
