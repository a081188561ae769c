"""What of a run is in a training checkpoint, and how it goes back into a run that begins again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.errors import DataError
from rlhf.fp8.state import fp8_state, load_fp8_state, uncalibrated
from rlhf.training import checkpoint
from rlhf.training.optimization import MOMENTS

if TYPE_CHECKING:
    from rlhf.training.session import Training

CHECKPOINTS = "checkpoints"


def require_room(train: Training) -> None:
    """Raises StorageError where the checkpoints and the result of the run are sure not to fit on the disk."""
    weights = sum(p.numel() * p.element_size() for p in train.policy.parameters() if p.requires_grad)
    every, keep = train.config.checkpoint.every, train.config.checkpoint.keep
    saves = 1 if train.schedule.unit == "tokens" else train.length // every if every else 0
    if train.is_main:
        # one more than is kept: the oldest goes when the newest is there
        checkpoint.require_room(train.run / CHECKPOINTS, (1 + len(MOMENTS)) * weights, min(keep + 1, saves), weights)


def save(train: Training) -> None:
    """Commits a training checkpoint of the steps done so far."""
    weights = ((name, train.engine.whole(p)) for name, p in train.policy.named_parameters() if p.requires_grad)
    tensors = {"model": _on_main(train, weights), "optimizer": _on_main(train, train.engine.optimizer_tensors())}
    tensors |= {name: _on_main(train, weights.named()) for name, weights in train.weights.items()}
    if train.is_main:
        for records in (train.metrics, train.samples, train.notes, train.alarms):
            records.sync()
        if in_fp8 := fp8_state(train.all_models()):
            tensors["fp8"] = in_fp8
        own = {"step": train.step_done, "tokens": train.tokens_done, "result": train.result}
        state = {"training": own} | {name: value.state_dict() for name, value in train.states.items()}
        checkpoint.save(train.run / CHECKPOINTS, train.step_done, tensors, state, train.config.checkpoint.keep)
    train.wait_for_main()


def restore(train: Training) -> dict[str, Tensor]:
    """Puts back all but the optimizer's state, which is returned: weights go in before the engine takes the model over.

    Raises:
        DataError: as `checkpoint.latest`; or the checkpoint is of other weights.
    """
    found = checkpoint.latest(train.run / CHECKPOINTS, train.note, train.resume.step) if train.is_main else None
    train.wait_for_main()
    step = train.gather(found and found.step)[0]
    if not train.is_main and step is not None:
        found = checkpoint.at(train.run / CHECKPOINTS, step)
    train.wait_for_main()  # not inside an exchange of tensors, with its shorter deadline
    if train.is_main:
        for records in (train.metrics, train.samples, train.alarms):
            records.cut(found.step if found else -1)
        train.notes.cut(found.step if found else 0)  # those of step 0 are of the opening, which this start has had as well
    if found is None:
        return {}
    weights, state = found.tensors("model"), found.state()
    trained = {name: p for name, p in train.policy.named_parameters() if p.requires_grad}
    if set(weights) != set(trained):
        raise DataError(f"{found.directory}: holds other weights than this config trains; choose another --output")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(weights[name])
    for name, others in train.weights.items():
        others.restore(found.tensors(name))
    if fp8_state(train.all_models()):
        saved = found.tensors("fp8", optional=True)
        load_fp8_state(train.all_models(), saved, strict=not train.resume.allow_inexact)
    if train.resume.allow_inexact and (fresh := uncalibrated(train.policy)):
        train.note(f"{len(fresh)} FP8 layers have no scale in the checkpoint and begin with one of their own")
    own = state["training"]
    train.step_done, train.tokens_done, train.result = own["step"], own["tokens"], own["result"]
    for name, value in train.states.items():
        value.load_state_dict(state[name])
    train.note(f"goes on from {found.directory}: {found.why}")
    return found.tensors("optimizer")


def _on_main(train: Training, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that all ranks put together, in the memory of rank 0's host."""
    kept = {}
    for name, tensor in tensors:
        if train.is_main:
            kept[name] = tensor.detach().cpu()
    return kept
