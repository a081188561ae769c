"""How many steps a run has, how many operations, seconds and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

from rlhf.config.schema import DpoConfig, KtoConfig, PolicyStage, SftConfig
from rlhf.models.actor_critic import unwrapped
from rlhf.training.memory import bytes_of
from rlhf.training.plan.cast import reward_role
from rlhf.training.plan.machines import Machine
from rlhf.training.plan.making import Stages
from rlhf.training.plan.work import Passed, decoding_seconds, passed


@dataclass(frozen=True)
class Run:
    """Of the whole run, over all processes; an iteration of PPO is a step here."""

    steps: int
    tokens: float
    """That pass through the trained policy in training (each epoch of an iteration counts)"""
    flop: dict[str, float]
    """By phase"""
    generated: float = 0.0
    """Tokens sampled"""


def run_of(stage: Stages) -> Run:
    """Raises nothing: sizes are known by now."""
    config: Any = stage.config
    mean, rows, batch = stage.lengths.mean, stage.lengths.rows, stage.batch_size
    models = _passed(stage)
    if isinstance(config, PolicyStage):
        per_epoch = ceil(rows / config.rollout.batch_size)
        steps = config.schedule.length * (per_epoch if config.schedule.unit == "epochs" else 1)
        replies, reply = config.replies, config.rollout.max_new_tokens
        tokens, read = replies * (mean.prompt + reply), replies * reply
        own = [models[name] for name in ("actor", "critic") if name in models]
        frozen = [model for name, model in models.items() if name not in ("actor", "critic")]
        sampling = models["actor"].forward(replies * mean.prompt, replies) + models["actor"].forward(read, read)
        flop = {
            "rollout": 0.0 if config.rollout.engine == "vllm" else sampling,
            "score": sum(model.forward(tokens, read) for model in (*own, *frozen)),
            "update": config.update.epochs * sum(model.training(tokens, read) for model in own),
        }
        counted = {name: steps * size for name, size in flop.items()}
        return Run(steps, float(steps * config.update.epochs * tokens), counted, float(steps * read))
    policy = next(iter(models.values()))
    read = mean.read if isinstance(config, SftConfig) else sum(mean.replies)
    steps = {
        "steps": lambda: config.schedule.length,
        "epochs": lambda: ceil(config.schedule.length * rows / batch),
        "tokens": lambda: ceil(config.schedule.length / (batch * max(1, read))),
    }[config.schedule.unit]()
    trained_rows = min(steps * batch, config.schedule.length * rows) if config.schedule.unit == "epochs" else steps * batch
    flop = {"training": trained_rows * policy.training(mean.tokens, read)}
    if isinstance(config, KtoConfig):
        flop["baseline"] = trained_rows * policy.forward(mean.tokens, read)
    if isinstance(config, KtoConfig) or (isinstance(config, DpoConfig) and config.loss.referenced):
        times = 2 if isinstance(config, KtoConfig) else 1  # KTO's mismatched replies have a reference, too
        flop["reference"] = times * min(rows, trained_rows) * policy.forward(mean.tokens, read)
    return Run(steps, float(trained_rows * mean.tokens), flop)


def seconds_of(stage: Stages, run: Run, machine: Machine, processes: int) -> dict[str, float] | None:
    """By phase; None where the machine's speed is not known."""
    if machine.flops is None:
        return None
    speed = machine.flops * machine.mfu
    found = {name: flop / (processes * speed) for name, flop in run.flop.items()}
    config = stage.config
    if isinstance(config, PolicyStage) and config.rollout.engine != "vllm":
        actor = stage.cast.policy.actor
        assert actor is not None
        model = _passed(stage)["actor"]
        replies, here = config.replies, ceil(config.replies / processes)
        prefill = model.forward(replies * stage.lengths.mean.prompt, replies) / (processes * speed)
        weights = bytes_of(actor.parameters()) / (2 if config.precision == "bf16" else 1)
        rows, reply = min(config.rollout.generation_batch_size, here), config.rollout.max_new_tokens
        least = machine.seconds_per_layer * unwrapped(actor).config.get_text_config().num_hidden_layers
        decode = decoding_seconds(model.forward(1, 1), weights, rows, here, reply, speed, machine.bandwidth, least)
        found["rollout"] = run.steps * (prefill + decode)
    return found


def _passed(stage: Stages) -> dict[str, Passed]:
    """By role; of adapters on one base every frozen role is the base."""
    config, found = stage.config, {}
    for name, part in stage.cast.parts.items():
        if name == "value head":
            continue
        model = part if name in ("actor", "critic") else (getattr(part, "actor", None) or getattr(part, "critic", None))
        assert model is not None
        found[name] = passed(model, config.gradient_checkpointing, config.frozen_layers)
    if isinstance(config, PolicyStage) and getattr(config.roles, "mode", "") == "adapters":
        frozen = (["reference"] if config.kl.coef else []) + [reward_role(name) for name in config.reward.models]
        found |= dict.fromkeys(frozen, found["actor"])
    return found
