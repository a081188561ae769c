"""A forward pass written from Megatron's side: logits straight from a checkpoint's own tensors, rank by rank.

It exists to prove conversions. It takes every matrix as its writer keeps it (query, key and value by group, gate over up on
each rank) and shares no code with what takes those apart, so a wrong order on either side shows as different logits. Plain
attention over short inputs, in float32; not meant to be fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoConfig
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rlhf.checkpoints.computed import as_args
from rlhf.checkpoints.family import Family
from rlhf.checkpoints.operations import Heads
from rlhf.checkpoints.stored import Stored
from rlhf.errors import DataError

Side = Literal["input", "output"]


@dataclass(frozen=True)
class Place:
    """A point that a forward pass came through, and what it held there."""

    module: str
    """the matrix or the norm, under our name"""
    side: Side
    within: str
    """of the tensors read before, those whose names start so are what the values hang on"""
    values: tuple[Tensor, ...]
    """one, or one for each matrix that the module holds (query, key and value; gate and up)"""
    read: tuple[str, ...]
    """the tensors read since the place before"""


class MegatronForward:
    """Logits of a model from its tensors under our names."""

    def __init__(self, tensors: Mapping[str, Stored], heads: Heads, family: Family, config: Mapping[str, Any]) -> None:
        """
        Raises:
            DataError: the model does something this forward does not know.
        """
        if family.mapping_only:
            raise DataError(f"{family.name}: tensor mapping only: {family.mapping_only}")
        self.tensors, self.heads, self.family, self.config = tensors, heads, family, config
        self.position = (config.get("alibi") and "alibi") or family.args["position_embedding_type"]
        self.epsilon = float(family.size(config, "norm_epsilon") or 1e-5)
        named = next((config[key] for key in ("hidden_act", "activation_function", "activation") if config.get(key)), None)
        self.activation = ACT2FN[named or ("gelu_pytorch_tanh" if family.name == "bloom" else "gelu")]
        self.layers = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.layers."))
        self._places: list[Place] = []
        self._read: list[str] = []

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        self._places, self._read = [], []
        x = F.embedding(ids, self._weight("embedding.word_embeddings.weight"))
        if "embedding.position_embeddings.weight" in self.tensors:
            x = x + self._weight("embedding.position_embeddings.weight")[: ids.shape[1]]
        if "embedding.norm.weight" in self.tensors:
            x = self._norm(x, "embedding.norm")
        for number in range(self.layers):
            x = self._layer(x, f"decoder.layers.{number}")
        x = self._norm(x, "decoder.final_layernorm")
        head = "output_layer.weight" if "output_layer.weight" in self.tensors else "embedding.word_embeddings.weight"
        return x @ self._weight(head).T

    def trace(self, ids: Tensor) -> tuple[list[Place], tuple[str, ...]]:
        """(every place in order, the tensors read after the last: the head)"""
        self(ids)
        return self._places, tuple(self._read)

    def _reached(self, module: str, side: Side, within: str, *values: Tensor) -> None:
        self._places.append(Place(module, side, within, values, tuple(self._read)))
        self._read = []

    def _layer(self, x: Tensor, layer: str) -> Tensor:
        normed = self._norm(x, f"{layer}.input_layernorm")
        if f"{layer}.pre_mlp_layernorm.weight" not in self.tensors:  # Falcon 7B: both read the one norm
            return x + self._attention(normed, f"{layer}.self_attention") + self._mlp(normed, f"{layer}.mlp")
        if self.family.name.startswith("falcon"):
            other = self._norm(x, f"{layer}.pre_mlp_layernorm")
            return x + self._attention(normed, f"{layer}.self_attention") + self._mlp(other, f"{layer}.mlp")
        x = x + self._attention(normed, f"{layer}.self_attention")
        normed = self._norm(x, f"{layer}.pre_mlp_layernorm")
        if f"{layer}.mlp.router.weight" in self.tensors:
            return x + self._experts(normed, f"{layer}.mlp")
        return x + self._mlp(normed, f"{layer}.mlp")

    def _norm(self, x: Tensor, name: str) -> Tensor:
        self._reached(name, "input", "", x)
        normed = self._normed(x, name)
        self._reached(name, "output", f"{name}.", normed)
        return normed

    def _normed(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self._weight(f"{name}.weight"), self._if_there(f"{name}.bias")
        if self.family.args["normalization"] == "RMSNorm":
            return F.rms_norm(x, weight.shape, weight, self.epsilon)
        return F.layer_norm(x, weight.shape, weight, bias, self.epsilon)

    def _attention(self, x: Tensor, name: str) -> Tensor:
        batch, length, _ = x.shape
        per_group = self.heads.heads // self.heads.groups
        width = self.tensors[f"{name}.linear_proj.weight"].shape[1] // self.heads.heads
        columns = [part.view(batch, length, -1, per_group + 2, width) for part in self._columns(x, f"{name}.linear_qkv")]
        self._reached(f"{name}.linear_qkv", "output", f"{name}.linear_qkv.", *_apart(torch.cat(columns, 2)))
        contexts = []
        for fused in columns:
            groups = fused.permute(0, 2, 3, 1, 4)
            q, k, v = groups[:, :, :per_group], groups[:, :, per_group], groups[:, :, per_group + 1]
            q, k = (
                self._rotated(self._head_norm(q, f"{name}.q_layernorm")),
                self._rotated(self._head_norm(k, f"{name}.k_layernorm")),
            )
            scores = torch.einsum("bghtd,bgsd->bghts", q, k) / math.sqrt(width)
            scores = scores + self._slopes(scores.shape[1] * per_group, len(contexts)).view(-1, per_group, 1, 1) * torch.arange(
                length
            )
            scores = scores.masked_fill(self._unseen(length), -math.inf)
            context = torch.einsum("bghts,bgsd->bghtd", scores.softmax(-1), v)
            contexts.append(context.permute(0, 3, 1, 2, 4).reshape(batch, length, -1))
        return self._rows(torch.cat(contexts, -1), f"{name}.linear_proj")

    def _unseen(self, length: int) -> Tensor:
        """(T, T), true where a token does not see another: those after it, and those before its sliding window."""
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        window = as_args(self.config).get("window_size")
        return ~(seen.triu(-window[0]) if window else seen)

    def _head_norm(self, x: Tensor, name: str) -> Tensor:
        return self._normed(x, name) if f"{name}.weight" in self.tensors else x

    def _rotated(self, x: Tensor) -> Tensor:
        """Rotary positions, the two halves of a head turned against each other (rotary_interleaved false)."""
        if self.position != "rope":
            return x
        width = int(x.shape[-1] * float(self.config.get("partial_rotary_factor") or 1))
        frequencies, factor = self._frequencies(width)
        angles = torch.arange(x.shape[-2]).float()[:, None] * frequencies
        cosine, sine = factor * angles.cos(), factor * angles.sin()
        first, second, rest = x[..., : width // 2], x[..., width // 2 : width], x[..., width:]
        return torch.cat([first * cosine - second * sine, second * cosine + first * sine, rest], -1)

    def _frequencies(self, width: int) -> tuple[Tensor, float]:
        """(radians a position for each pair, a factor of both waves); the scaled forms as transformers computes them."""
        scaling = self.config.get("rope_parameters") or self.config.get("rope_scaling") or {}
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind == "default":
            base = float(self.family.size(self.config, "rotary_base") or 10000)
            return base ** (-torch.arange(0, width, 2).float() / width), 1.0
        config = AutoConfig.for_model(**self.config)
        return ROPE_INIT_FUNCTIONS[kind](config, device=torch.device("cpu"))

    def _slopes(self, heads: int, rank: int) -> Tensor:
        """ALiBi's slope for each head of a rank (https://arxiv.org/abs/2108.12409, as BLOOM counts heads); 0 without."""
        if self.position != "alibi":
            return torch.zeros(heads)
        total = self.heads.heads
        closest = 2 ** math.floor(math.log2(total))
        base = 2.0 ** (-(2.0 ** -(math.log2(closest) - 3)))
        extra = 2.0 ** (-(2.0 ** -(math.log2(2 * closest) - 3)))
        slopes = [base ** (1 + head) for head in range(closest)] + [extra ** (1 + 2 * head) for head in range(total - closest)]
        return torch.tensor(slopes)[rank * heads : (rank + 1) * heads]

    def _mlp(self, x: Tensor, name: str) -> Tensor:
        hidden = self._columns(x, f"{name}.linear_fc1")
        inner = self.tensors[f"{name}.linear_fc2.weight"].shape[1]
        gated = sum(part.shape[-1] for part in hidden) == 2 * inner
        halves = [part.chunk(2, -1) if gated else (part,) for part in hidden]
        whole = [torch.cat(half, -1) for half in zip(*halves, strict=True)]
        self._reached(f"{name}.linear_fc1", "output", f"{name}.linear_fc1.", *whole)
        hidden = [self.activation(first) * rest[0] if rest else self.activation(first) for first, *rest in halves]
        return self._rows(torch.cat(hidden, -1), f"{name}.linear_fc2")

    def _experts(self, x: Tensor, name: str) -> Tensor:
        chosen = int(self.family.size(self.config, "experts_per_token"))
        weights, experts = (x @ self._weight(f"{name}.router.weight").T).softmax(-1).topk(chosen)
        if "router_renormalised" not in self.family.sizes or self.family.size(self.config, "router_renormalised"):
            weights = weights / weights.sum(-1, keepdim=True)
        result = torch.zeros_like(x)
        for expert in experts.unique().tolist():
            share = (weights * (experts == expert)).sum(-1, keepdim=True)
            result = result + share * self._mlp(x, f"{name}.experts.{expert}")
        if f"{name}.shared_experts.linear_fc1.weight" in self.tensors:
            shared = self._mlp(x, f"{name}.shared_experts")
            gate = self._if_there(f"{name}.shared_experts.gate_weight")
            result = result + (shared if gate is None else shared * (x @ gate.T).sigmoid())
        return result

    def _columns(self, x: Tensor, name: str) -> list[Tensor]:
        """What each rank computes of a matrix whose rows are spread over ranks."""
        weight, bias = self.tensors[f"{name}.weight"], self.tensors.get(f"{name}.bias")
        self._read += [f"{name}.weight", f"{name}.bias"] if bias else [f"{name}.weight"]
        weights = weight.ranks or (weight,)
        biases = (bias.ranks or (bias,)) if bias else [None] * len(weights)
        return [
            F.linear(x, part.read().float(), own.read().float() if own else None)
            for part, own in zip(weights, biases, strict=True)
        ]

    def _rows(self, x: Tensor, name: str) -> Tensor:
        self._reached(name, "input", f"{name.rpartition('.')[0]}.", x)
        return F.linear(x, self._weight(f"{name}.weight"), self._if_there(f"{name}.bias"))

    def _weight(self, name: str) -> Tensor:
        self._read.append(name)
        return self.tensors[name].read().float()

    def _if_there(self, name: str) -> Tensor | None:
        return self._weight(name) if name in self.tensors else None


def _apart(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(query, key, value) of all heads side by side, of (B, T, groups, queries + 2, D)."""
    return groups[..., :-2, :].flatten(2), groups[..., -2, :].flatten(2), groups[..., -1, :].flatten(2)
