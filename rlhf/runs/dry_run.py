"""What a command would do, before it does it: the batch arithmetic, the launch command, the files it would write."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from rlhf.config.engines import require_fit
from rlhf.config.parse import Invocation
from rlhf.config.schema import DpoConfig, KtoConfig, PolicyStage, PpoConfig, RmConfig, SftConfig
from rlhf.data.shapes import Kind, Schema
from rlhf.runs.launch import command, engine_of, machines_of, printable

ROWS: dict[str, Kind] = {"sft": "sft", "rm": "ranking", "dpo": "pair", "kto": "rated", "ppo": "prompt", "grpo": "prompt"}


def describe(invocation: Invocation) -> dict[str, Any]:
    """The dry run as data: {"stage", "config", "batches", "commands", "writes"}, a command for each machine. Neither models nor
    rows are opened."""
    config = invocation.config
    machines = machines_of(invocation.launch, invocation.machines)
    how = invocation.stage, invocation.launch, invocation.nproc, invocation.arguments, config.threads
    commands = [command(*how, replace(machines, rank=rank)) for rank in range(machines.count)]
    _, env = commands[0]
    require_together(invocation)
    return {
        "stage": invocation.stage,
        "config": config.model_dump(mode="json"),
        "batches": batches(config, processes=int(env["RLHF_EXPECTED_WORLD_SIZE"])),
        "commands": [printable(*one) for one in commands],
        "writes": writes(config),
    }


def require_together(invocation: Invocation) -> None:
    """Raises ConfigError where the config does not go with the launch file's engine, or names columns its rows do not have."""
    data = invocation.config.data
    require_fit(invocation.config, engine_of(invocation.launch))
    Schema.of(ROWS[invocation.stage], data.columns, getattr(data, "json_key", None), data.extra_columns)


def batches(config: Any, processes: int) -> list[str]:
    """How rows become optimizer steps, one sentence a line."""
    if isinstance(config, PolicyStage):
        return _iteration(config, processes)
    assert isinstance(config, SftConfig | RmConfig | DpoConfig | KtoConfig)
    rows = {RmConfig: "prompts", DpoConfig: "pairs", KtoConfig: "replies"}.get(type(config), "rows")
    if isinstance(config, SftConfig) and config.data.packing:
        rows = "sequences"
    schedule = config.schedule
    length = {
        "steps": f"{schedule.length} optimizer steps in all: {schedule.length * config.batch_size} {rows}",
        "epochs": f"{schedule.length} epochs: one optimizer step for every {config.batch_size} {rows} of each",
        "tokens": f"as many optimizer steps as {schedule.length} tokens with a loss take",
    }
    step = _step(config.batch_size, rows, processes, config.micro_batch_size)
    return [f"{config.batch_size} {rows} per optimizer step = {step}", length[schedule.unit]]


def writes(config: Any) -> list[str]:
    """The files a run leaves, where it would leave them."""
    names = ["run.json", "status.json", "metrics.jsonl", "notes.jsonl"]
    if isinstance(config, PolicyStage) and config.report.samples:
        names.append("samples.jsonl")
    if isinstance(config, PolicyStage) and config.alarms.action != "none":
        names.append("alarms.jsonl")
    if config.report.profile:
        names.append("profile/")
    names += ["checkpoints/step-N/", "model/"]
    if isinstance(config, PpoConfig):
        names.append("critic/")
    if isinstance(config, PolicyStage) and config.ema_decay:
        names.append("ema/")
    return [f"{config.output.rstrip('/')}/{name}" for name in names]


def _iteration(config: PolicyStage, processes: int) -> list[str]:
    rollout, update, schedule, replies = config.rollout, config.update, config.schedule, config.replies
    minibatches = math.ceil(replies / update.minibatch_size)
    steps = minibatches * update.epochs
    length = {
        "steps": f"{schedule.length} iterations: {schedule.length * steps} optimizer steps, "
        f"{schedule.length * replies} replies in all",
        "epochs": f"{schedule.length} epochs: one iteration for every {rollout.batch_size} prompts of each",
    }
    return [
        f"{replies} replies per iteration = {rollout.batch_size} prompts x {rollout.samples_per_prompt} samples, "
        f"at most {rollout.generation_batch_size} sampled at a time by each of {_count(processes, 'process')}",
        f"{steps} optimizer steps per iteration = {minibatches} minibatches x {update.epochs} epochs",
        f"{update.minibatch_size} replies per optimizer step = "
        + _step(update.minibatch_size, "replies", processes, config.micro_batch_size),
        length[schedule.unit],
    ]


def _step(batch: int, rows: str, processes: int, micro_batch: int) -> str:
    share = math.ceil(batch / processes)
    accumulation = math.ceil(share / micro_batch)
    parts = _count(accumulation, "micro-batch")
    if processes * micro_batch * accumulation == batch:
        return f"{_count(processes, 'process')} x {micro_batch} {rows} per micro-batch x {parts}"
    below, above = batch // processes * processes, -(-batch // processes) * processes
    even = "" if below == above else f"; {f'{below} or ' if below else ''}{above} would divide evenly"
    return f"{_count(processes, 'process')} x up to {share} {rows}, in {parts} of up to {micro_batch}{even}"


def _count(number: int, word: str) -> str:
    return f"{number} {word}" + ("" if number == 1 else "es")
