"""The optimizer and its schedule: AdamW by role, learning rates as a function of how much of the run is done."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config.policies import PpoOptimizer
from rlhf.config.sections import Optimizer, Schedule
from rlhf.models.actor_critic import role_of

MOMENTS = ("exp_avg", "exp_avg_sq")
EXTRA_STATE = ("step", *MOMENTS)
"""AdamW's state of one parameter."""


def open_optimizer(policy: nn.Module, config: Optimizer) -> torch.optim.AdamW:
    """AdamW over the trained weights; in PPO the critic's (and the value head's) have a learning rate of their own.

    Biases and norms decay like the rest: one rule is easier to reason about.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        role = role_of(name)
        lr = config.critic_lr if isinstance(config, PpoOptimizer) and role == "critic" else config.lr
        group = groups.setdefault(role, {"role": role, "params": [], "names": [], "peak": lr, "lr": lr, "frozen": False})
        group["params"].append(parameter)
        group["names"].append(name)
    return torch.optim.AdamW(
        list(groups.values()),
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def clipped_step(optimizer: torch.optim.Optimizer, model: nn.Module, max_norm: float) -> float:
    """Clips, steps and clears the gradients, which ranks may divide; their norm. Where that is not finite it does not step."""
    norm: Any = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # of a DTensor: who has none imports none
    if norm < float("inf"):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def skip_frozen(optimizer: torch.optim.Optimizer) -> None:
    """From now on steps pass over groups with a true `frozen`, weights, moments and step counts to the bit.

    For whoever calls `step`: an engine may hand the optimizer tensors of its own.
    """

    def without_gradients(stepping: torch.optim.Optimizer, *_: Any) -> None:
        for group in stepping.param_groups:
            if group["frozen"]:
                for parameter in group["params"]:
                    parameter.grad = None  # Adam skips it; a gradient of 0 would count as a step

    optimizer.register_step_pre_hook(without_gradients)


def schedule_factor(schedule: Schedule, before: float, after: float) -> float:
    """Learning rate as a part of its peak, for a step that takes the run from `before` to `after` (parts of the whole).

    The warm-up looks at where the step ends, so that the first is not wasted at 0; the decay at where it starts, so that the
    first after the warm-up has the peak. `final` is reached as the run ends.
    """
    if after < schedule.warmup:
        return after / schedule.warmup
    done = max(0.0, before - schedule.warmup) / (1 - schedule.warmup)
    left = {
        "constant": 1.0,
        "linear": 1 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * min(done, 1.0))),
    }[schedule.decay]
    return schedule.final + (1 - schedule.final) * left if schedule.decay != "constant" else 1.0


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by `parameter.state` names, ready for safetensors."""
    return {
        f"{name}.{key}": optimizer.state[parameter][key]
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
        if parameter in optimizer.state
        for key in EXTRA_STATE
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Puts saved state back, in place of any there is."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if f"{name}.step" not in tensors:
                continue
            state = {key: tensors[f"{name}.{key}"].clone() for key in EXTRA_STATE}
            optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}
