"""Whether a conversion computes what its source does: logits and a greedy continuation, side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from rlhf.checkpoints import hugging_face, megatron, sizes
from rlhf.checkpoints.convert import Conversion
from rlhf.checkpoints.directory import is_megatron
from rlhf.checkpoints.forward import MegatronForward
from rlhf.checkpoints.locate import Parting, as_held, first_parting, held_by
from rlhf.errors import CheckFailed, DataError

TOLERANCE = 1e-4
"""Of the largest logit: rounding of two float32 forward passes is a hundredth of this; a swapped matrix is thousands of it."""
ROWS, TOKENS, CONTINUED = 2, 12, 8
SEED = 0


class TransformersForward:
    """A Hugging Face model's forward pass in float32."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        """(B, T) token ids to (B, T, V) logits."""
        return self.model(ids).logits.float()


Forward = MegatronForward | TransformersForward


@dataclass(frozen=True)
class Verdict:
    """How near two models are on the same tokens."""

    reference: str
    max_difference: float
    largest_logit: float
    top1_agreement: float
    """part of positions where both put the same token first"""
    continuation: bool
    """whether both continue greedily with the same tokens"""

    @property
    def holds(self) -> bool:
        return self.max_difference <= TOLERANCE * max(1.0, self.largest_logit)

    def __str__(self) -> str:
        same = "the same" if self.continuation else "different"
        return (
            f"against {self.reference}: logits differ by at most {self.max_difference:.2g} (largest {self.largest_logit:.3g}), "
            f"top-1 agrees on {self.top1_agreement:.1%}, greedy continuation {same}"
        )


def verify(conversion: Conversion, reference: Path | None = None) -> Verdict:
    """Compare what was written with its source, or with a Hugging Face model given as the reference.

    Raises:
        CheckFailed: they do not compute the same, or cannot be compared (the message says why).
    """
    request, family = conversion.request, conversion.family
    if family is not None and family.mapping_only:
        raise CheckFailed(f"{family.name}: tensor mapping only: {family.mapping_only}")
    try:
        if request.to == "hf" and family is not None:
            result = opened(request.destination)
            against = opened(reference) if reference else _source(conversion)
            name = str(reference) if reference else f"a forward pass over the tensors of {request.source}"
        elif family is None:
            if reference is None:
                raise CheckFailed("--verify: there is nothing here to compare with; give --reference, a Hugging Face directory")
            result, against, name = opened(request.destination), opened(reference), str(reference)
        else:
            result = _written(conversion)
            home = reference or (None if is_megatron(request.source) else request.source)
            against = opened(home) if home else _source(conversion)
            name = str(home or request.source)
    except DataError as error:
        raise CheckFailed(f"--verify: {error}") from error
    verdict = compared(result, against, conversion, name)
    if not verdict.holds:
        named = _differing(request.destination, reference) if request.to == "hf" and reference else ""
        parting = _parting(result, against, conversion)
        raise CheckFailed(f"{request.destination}: not the same model: {verdict}{f'; {parting}' if parting else ''}{named}")
    return verdict


def _differing(result: Path, reference: Path) -> str:
    """The tensors two Hugging Face directories differ in, in words."""
    ours, theirs = hugging_face.read_tensors(result), hugging_face.read_tensors(reference)
    different = [key for key in ours if key in theirs and not torch.equal(ours[key].read(), theirs[key].read())]
    more = f" and {len(different) - 5} more" if len(different) > 5 else ""
    return f"; tensors that differ: {', '.join(different[:5])}{more}" if different else ""


def _parting(result: Forward, against: Forward, conversion: Conversion) -> Parting | None:
    """Where they part, if one of the two is a forward pass that can be traced."""
    traced, other = (result, against) if isinstance(result, MegatronForward) else (against, result)
    if not isinstance(traced, MegatronForward):
        return None
    ids = _tokens(conversion)
    places, head = traced.trace(ids)
    held = held_by(other.model, ids, places) if isinstance(other, TransformersForward) else as_held(other.trace(ids)[0])
    written = {step.ours: [key for _, key in step.targets] for step in conversion.target.steps}
    return first_parting(places, head, held, written)


def _tokens(conversion: Conversion) -> Tensor:
    length, _ = _lengths(conversion)
    return torch.randint(_vocabulary(conversion), (ROWS, length), generator=torch.Generator().manual_seed(SEED))


def _lengths(conversion: Conversion) -> tuple[int, int]:
    """(tokens given, tokens continued): no more than the model has positions."""
    positions = conversion.family.size(conversion.config, "positions") if conversion.family else None
    positions = positions or conversion.config.get("max_position_embeddings") or TOKENS + CONTINUED
    continued = min(CONTINUED, positions // 2)
    return min(TOKENS, positions - continued), continued


def compared(result: Forward, against: Forward, conversion: Conversion, name: str) -> Verdict:
    ids, (_, continued) = _tokens(conversion), _lengths(conversion)
    ours, theirs = result(ids), against(ids)
    rows = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[..., :rows], theirs[..., :rows]
    return Verdict(
        reference=name,
        max_difference=float((ours - theirs).abs().max()),
        largest_logit=float(theirs.abs().max()),
        top1_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).float().mean()),
        continuation=torch.equal(_continued(result, ids, rows, continued), _continued(against, ids, rows, continued)),
    )


def _vocabulary(conversion: Conversion) -> int:
    sizes_told = conversion.family.size(conversion.config, "vocabulary") if conversion.family else None
    return int(sizes_told or conversion.config.get("vocab_size") or 0) or 2


def _continued(logits: Forward, ids: Tensor, rows: int, count: int) -> Tensor:
    for _ in range(count):
        ids = torch.cat([ids, logits(ids)[:, -1:, :rows].argmax(-1)], 1)
    return ids


def opened(directory: Path) -> TransformersForward:
    """A Hugging Face model's forward pass in float32, every tensor of its files in use.

    Raises:
        DataError: transformers cannot open it, or does not find or does not use one of its tensors.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=False, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise DataError(f"{directory}: transformers cannot open it: {str(error).strip().splitlines()[0]}") from error
    model, report = loaded
    for what, keys in (("does not find", report["missing_keys"]), ("has no use for", report["unexpected_keys"])):
        if keys:
            raise DataError(f"{directory}: transformers {what} {', '.join(sorted(keys)[:5])}")
    return TransformersForward(model)


def _source(conversion: Conversion) -> MegatronForward:
    source = conversion.source
    assert source.heads is not None
    assert conversion.family is not None
    return MegatronForward(source.tensors, source.heads, conversion.family, conversion.config)


def _written(conversion: Conversion) -> MegatronForward:
    """What was written, read back and computed from its own tensors."""
    assert conversion.family is not None
    told, heads = sizes.of_config(conversion.family, conversion.config), conversion.source.heads
    reading = megatron.Reading(told.get("heads"), heads.groups if heads else None, told.get("tied"))
    written = megatron.read_megatron(conversion.request.destination, reading)
    assert written.heads is not None
    return MegatronForward(written.tensors, written.heads, conversion.family, conversion.config)
