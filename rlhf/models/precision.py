"""One model in several precisions, one after the other: what differs between them is the precision and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from rlhf.config.commands import Inference
from rlhf.config.sections import Fp8
from rlhf.errors import OutOfMemory
from rlhf.fp8.apply import apply, described, undo
from rlhf.models.roles import Roles

FP8 = "fp8"


@dataclass(frozen=True)
class Precision:
    name: str
    autocast: bool
    """Whether what is not FP8 computes in bfloat16, over float32 weights."""
    fp8: Fp8 | None = None


def precisions(config: Inference) -> list[Precision]:
    """Those asked for. FP8 comes first: where a model cannot have it, that is said before any work is done."""
    in_fp8 = Precision(FP8, config.plain == "bf16", config.fp8)
    plain = Precision(config.plain, config.plain == "bf16")
    asked = {"fp32": [Precision("fp32", False)], "bf16": [Precision("bf16", True)], FP8: [in_fp8], "both": [in_fp8, plain]}
    return asked[config.precision]


@contextmanager
def computing_in(precision: Precision, roles: Roles, rows: Sequence[list[int]], batch_size: int) -> Iterator[str]:
    """The model computes in a precision for a while; yields what runs in FP8, in words.

    Args:
        rows: token ids the scales of delayed scaling are taken from, `batch_size` rows at a time.

    Raises:
        OutOfMemory: in place of torch's error.
    """
    model = roles.policy.actor or roles.policy.critic  # which know their heads; what holds them does not
    assert model is not None
    try:
        if precision.fp8 is not None:
            apply(model, precision.fp8)
        with torch.no_grad(), torch.autocast(roles.device.type, torch.bfloat16, enabled=precision.autocast):
            roles.calibrate(rows, batch_size)
            yield described(model)
    except (RuntimeError, MemoryError) as error:
        if full := OutOfMemory.behind(error, "lower batch_size"):
            raise full from error
        raise
    finally:
        undo(model)


@contextmanager
def cast_once(model: nn.Module) -> Iterator[None]:
    """In here autocast keeps what it has cast of frozen weights too, and not only of those that want a gradient.

    It keeps them until its outermost context ends, so a rollout would cast every frozen weight anew for each token.
    """
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
