"""Which layers run in FP8, and why the others do not: one table, read from the top; the first reason that holds counts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError
from rlhf.fp8.recipes import GEMMS, Gemm, kept_gemms

MULTIPLE = 16
"""Both dimensions of a weight must be a multiple of it for FP8 matrix products on a GPU (cuBLASLt)."""

LAYER_NUMBER = re.compile(r"\.(?:layers|h|blocks)\.(\d+)\.")


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer."""

    name: str
    """As in the model without adapters, which is also what `fp8.keep` is matched with."""
    place: str
    """As in the model at hand."""
    shape: tuple[int, int]
    """(out, in)"""
    high_precision: frozenset[Gemm]
    """Products left in high precision; all three: not an FP8 layer."""
    reason: str

    @property
    def in_fp8(self) -> bool:
        return len(self.high_precision) < len(GEMMS)


@dataclass(frozen=True)
class _Candidate:
    name: str
    module: nn.Module
    layers: int
    heads: frozenset[int]
    """ids of weights that make logits or belong to an embedding"""

    @property
    def number(self) -> int | None:
        found = LAYER_NUMBER.search(f".{self.name}")
        return int(found[1]) if found else None

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self.module.weight.shape  # pyright: ignore
        return (int(rows), int(columns))


Rule = tuple[Callable[[_Candidate, Fp8], bool], str]

RULES: tuple[Rule, ...] = (
    (lambda c, _: isinstance(c.module, nn.Embedding), "embedding: a look-up, no matrix product"),
    (lambda c, _: ".lora_" in f".{c.name}", "LoRA factor: small, and trained"),
    (lambda c, _: c.shape[0] == 1, "one output (a value, a reward, a gate): no product for tensor cores"),
    (lambda c, _: id(c.module.weight) in c.heads, "LM head: logits need high precision"),
    (lambda c, _: type(c.module) is not nn.Linear, "not an nn.Linear"),
    (lambda c, _: any(size % MULTIPLE for size in c.shape), f"a dimension is no multiple of {MULTIPLE}"),
    (lambda c, f: c.number is not None and c.number < f.keep_first, "fp8.keep_first"),
    (lambda c, f: c.number is not None and c.number >= c.layers - f.keep_last, "fp8.keep_last"),
    (lambda c, f: len(kept_gemms(c.name, f.keep)) == len(GEMMS), "fp8.keep"),
)


def plan(model: nn.Module, config: Fp8) -> list[Decision]:
    """A decision for every weight matrix of a model (which may be on the meta device, or wrapped by PEFT)."""
    modules = [
        (place, plain_name(place), module)
        for place, module in model.named_modules()
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2 and not hasattr(module, "base_layer")
    ]
    numbers = [int(found[1]) for _, name, _ in modules if (found := LAYER_NUMBER.search(f".{name}"))]
    heads = frozenset(id(weight) for weight in _embedding_weights(model))
    decisions = []
    for place, name, module in modules:
        candidate = _Candidate(name, module, max(numbers, default=-1) + 1, heads)
        reason = next((why for holds, why in RULES if holds(candidate, config)), "")
        kept = frozenset(GEMMS) if reason else kept_gemms(name, config.keep) | frozenset(config.high_precision)
        decisions.append(Decision(name, place, candidate.shape, kept, reason or _note(candidate, kept)))
    return decisions


def require_matches(decisions: Sequence[Decision], config: Fp8, model: nn.Module) -> None:
    """Raises ConfigError where a pattern of `fp8.keep` matches no layer, or names no product."""
    for pattern in config.keep:
        _, colon, gemm = pattern.partition(":")
        if colon and gemm not in GEMMS:
            raise ConfigError(f"fp8.keep: {pattern!r}: after the colon expected {', '.join(GEMMS)}, found {gemm!r}")
    missed = [pattern for pattern in config.keep if not any(kept_gemms(one.name, (pattern,)) for one in decisions)]
    if missed:
        names = sorted({one.name.rpartition(".")[2] for one in decisions})
        raise ConfigError(
            f"fp8.keep: {missed[0]!r} matches no layer of {type(model).__name__}; layers end in {', '.join(names)}"
        )


def require_any(decisions: Sequence[Decision], config: Fp8, model: nn.Module) -> None:
    """Raises ConfigError where no layer can run in FP8."""
    if not any(one.in_fp8 for one in decisions):
        raise ConfigError(
            f"fp8.recipe {config.recipe}: no layer of {type(model).__name__} can run in FP8 ({summary(decisions)})"
        )


def summary(decisions: Sequence[Decision]) -> str:
    """How many layers run in FP8, and how many do not for which reason."""
    left = Counter(one.reason.partition(":")[0] for one in decisions if not one.in_fp8)
    others = "".join(f"; {count} not: {reason}" for reason, count in left.items())
    return f"{sum(one.in_fp8 for one in decisions)} of {len(decisions)} weight matrices{others}"


def _note(candidate: _Candidate, kept: frozenset[Gemm]) -> str:
    notes = [f"{', '.join(sorted(kept))} in high precision"] if kept else []
    if not candidate.module.weight.requires_grad:  # pyright: ignore
        notes.append("frozen: no wgrad")
    return "; ".join(notes)


def plain_name(place: str) -> str:
    """A layer's name without the wrappers of PEFT."""
    return place.removeprefix("base_model.model.").removesuffix(".base_layer").replace(".modules_to_save.default", "")


def _embedding_weights(model: nn.Module) -> list[object]:
    """Of the embedding and of the head that makes logits; a reward model has none of these."""
    found = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, getter, lambda: None)()
        if isinstance(module, nn.Module):
            found.append(module.weight)
    return found
