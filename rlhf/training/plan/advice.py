"""The whole answer: does it fit, what would, how many cards, how long; as data that lines.py and --json show."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from rlhf.config.engines import Engine, require_fit
from rlhf.config.parse import Invocation
from rlhf.config.policies import Roles
from rlhf.config.schema import PolicyStage, Stage
from rlhf.errors import ConfigError
from rlhf.paths import CONFIGS
from rlhf.runs.dry_run import batches
from rlhf.runs.launch import engine_of
from rlhf.training.memory import bytes_of
from rlhf.training.plan.machines import CPU_GAPS, GPU_KEPT_FREE, Machine
from rlhf.training.plan.making import Need, Stages, largest_micro_batch
from rlhf.training.plan.timing import Run, run_of, seconds_of

COUNTS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Of cards that are looked at for a recommendation."""
ALONE, DIVIDING = Engine("ddp", 0), "fsdp"
"""One process has nobody to divide with; and what is looked at, too, where nothing fits under the engine asked for."""
LORA_RANK = 16
"""Of the LoRA that is tried where all else does not fit."""


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the stage's own flags."""

    processes: int
    price_per_hour: float | None = None
    """Of one card (or, on a CPU, of the machine)"""
    rows: int | None = None


def answer(invocation: Invocation[Any], machine: Machine, asked: Asked) -> dict[str, Any]:
    """Raises DataError where a model or the data are not there, ConfigError where the engine cannot do with the config."""
    config, engine = invocation.config, engine_of(invocation.launch)
    require_fit(config, engine)
    stage = Stages(config, asked.rows)
    need = stage.need(engine, asked.processes)
    room, run = machine.room(asked.processes), run_of(stage)
    largest = largest_micro_batch(stage, engine, asked.processes, machine)
    fits = _fits(need, machine, room)
    found: dict[str, Any] = {
        "stage": invocation.stage,
        "machine": asdict(machine) | {"processes": asked.processes, "room": room},
        "engine": engine.name,
        "rows": stage.lengths.source,
        "batches": batches(config, asked.processes),
        "parameters": _parameters(stage),
        "memory": _memory(need, machine) | {"fits": fits, "largest_micro_batch_size": largest},
        "engines": _engines(stage, machine, asked.processes),
        "turn": [] if fits is not False else list(_turns(stage, engine, machine, asked.processes, largest)),
        "run": _run(stage, run, machine, asked, asked.processes),
        "counts": _counts(stage, engine, run, machine, asked) if machine.kind == "cuda" else [],
        "recommended": None,
        "assumptions": _assumptions(stage, machine),
    }
    if found["counts"] and room is not None and not any(one["fits"] for one in found["counts"]) and engine.divides < 3:
        found["counts"] += _counts(stage, engine_of(DIVIDING), run, machine, asked)[1:]
    found["recommended"] = next((one for one in found["counts"] if one["fits"]), None)
    return found


def _fits(need: Need, machine: Machine, room: float | None) -> bool | None:
    return None if room is None else need.taken(machine.kind) <= room


def _memory(need: Need, machine: Machine) -> dict[str, Any]:
    return {
        "state": need.state,
        "phases": need.phases,
        "peak": need.peak,
        "taken": need.taken(machine.kind),
        "host": need.host,
    }


def _parameters(stage: Stages) -> dict[str, dict[str, int]]:
    return {
        name: {
            "all": sum(p.numel() for p in part.parameters()),
            "trained": sum(p.numel() for p in part.parameters() if p.requires_grad and name not in stage.cast.frozen),
            "bytes": bytes_of(part.parameters()),
        }
        for name, part in stage.cast.parts.items()
    }


def _engines(stage: Stages, machine: Machine, processes: int) -> list[dict[str, Any]]:
    """Of every shipped launch file that differs in what is divided or moved to the host."""
    found = []
    for name in ("ddp", "zero1", "zero2", "zero2-offload", "zero3", "zero3-offload", "fsdp"):
        assert (CONFIGS / "launch" / f"{name}.yaml").is_file()
        if processes == 1 and name != "ddp":
            continue  # nobody to divide with
        engine = engine_of(name)
        try:
            require_fit(stage.config, engine)
        except ConfigError as refusal:
            found.append({"launch": name, "peak": None, "fits": None, "why": str(refusal)})
            continue
        need = stage.need(engine, processes)
        fits = _fits(need, machine, machine.room(processes))
        found.append({"launch": name, "peak": need.peak, "host": need.host, "fits": fits, "why": None})
    return found


def _turns(stage: Stages, engine: Engine, machine: Machine, processes: int, largest: int | None) -> Iterator[dict[str, Any]]:
    """Flags that make it fit, the cheapest first; more than one where no single one does."""
    room = machine.room(processes)
    if largest:
        yield {"flags": f"--micro_batch_size {largest}", "peak": stage.need(engine, processes, largest).peak}
    for name in ("zero2", "fsdp", "zero3", "zero3-offload") if processes > 1 and machine.kind == "cuda" else ():
        other = engine_of(name)
        if other.divides > engine.divides and _fits(need := stage.need(other, processes), machine, room):
            yield {"flags": f"--launch {name}", "peak": need.peak}
            break
    changed: Stage = stage.config
    flags = []
    for flag, config in _smaller(stage.config):
        changed, flags = config(changed), [*flags, flag]
        need = Stages(changed, stage.rows).need(engine, processes)
        if _fits(need, machine, room):
            yield {"flags": " ".join(flags), "peak": need.peak}
            break


def _smaller(config: Stage) -> Iterator[tuple[str, Any]]:
    """(flag, what it does to a config), from what costs least to what changes most."""
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing", lambda one: one.model_copy(update={"gradient_checkpointing": True})
    if config.micro_batch_size > 1:  # pyright: ignore[reportAttributeAccessIssue]
        yield "--micro_batch_size 1", lambda one: one.model_copy(update={"micro_batch_size": 1})
    if isinstance(config, PolicyStage) and config.rollout.generation_batch_size > 8:
        few = {"generation_batch_size": 8}
        yield (
            "--rollout.generation_batch_size 8",
            lambda one: one.model_copy(update={"rollout": one.rollout.model_copy(update=few)}),
        )
    if isinstance(config, PolicyStage) and isinstance(config.roles, Roles) and config.roles.mode == "separate":
        shared = {"mode": "shared"}
        yield "--roles.mode shared", lambda one: one.model_copy(update={"roles": one.roles.model_copy(update=shared)})
    if not config.lora.rank and not config.frozen_layers:
        factors = {"rank": LORA_RANK}
        yield f"--lora.rank {LORA_RANK}", lambda one: one.model_copy(update={"lora": one.lora.model_copy(update=factors)})


def _run(stage: Stages, run: Run, machine: Machine, asked: Asked, processes: int) -> dict[str, Any]:
    phases = seconds_of(stage, run, machine, processes)
    seconds = sum(phases.values()) if phases else None
    cards = processes if machine.kind == "cuda" else 1
    price = asked.price_per_hour
    return asdict(run) | {
        "phases": phases,
        "seconds": seconds,
        "cost": seconds / 3600 * price * cards if seconds is not None and price is not None else None,
    }


def _counts(stage: Stages, engine: Engine, run: Run, machine: Machine, asked: Asked) -> list[dict[str, Any]]:
    """For each number of cards: whether it fits under the engine asked for (with one card, alone), how long and how much."""
    found = []
    for processes in COUNTS:
        if processes > stage.batch_size:
            break  # ranks without a row of a step
        used = engine if processes > 1 else ALONE
        need = stage.need(used, processes)
        told = _run(stage, run, machine, asked, processes)
        found.append(
            {
                "processes": processes,
                "engine": used.name,
                "peak": need.peak,
                "fits": _fits(need, machine, machine.room(processes)),
                "seconds": told["seconds"],
                "cost": told["cost"],
            }
        )
    return found


def _assumptions(stage: Stages, machine: Machine) -> list[str]:
    config, told = stage.config, [f"rows: {stage.lengths.source}"]
    if isinstance(config, PolicyStage):
        told.append(f"every reply is {config.rollout.max_new_tokens} tokens long (rollout.max_new_tokens)")
    weights = "float64" if config.precision == "fp64" else "float32"
    told.append(f"weights, gradients and AdamW's two moments in {weights}, whatever `precision` computes in")
    told.append("activations: the stage's own code on tensors without storage, on its longest rows; workspaces are not seen")
    if machine.kind == "cuda":
        told.append(f"{GPU_KEPT_FREE:.0%} of each card stays free, for CUDA's context and gaps; never measured on a GPU")
    else:
        told.append(f"what comes and goes takes up to {CPU_GAPS:.0%} more, in gaps of glibc's heap (docs/planning.md)")
    if machine.flops is not None:
        told.append(
            f"{machine.flops / 1e12:.4g} TFLOP/s of a card or process at most ({machine.source}), of which {machine.mfu:.0%} "
            "is reached; 6 FLOP for each weight and token of a training pass, 2 of a forward, attention's own left out"
        )
    if machine.bandwidth is not None and isinstance(config, PolicyStage):
        told.append(f"each sampled token reads all weights, at {machine.bandwidth / 1e9:,.0f} GB/s")
    if config.fp8.recipe != "none":
        told.append("FP8: activations as without it, and two copies of one byte of each weight that runs in FP8")
    told.append("time is of training steps: start, evaluation, checkpoints and exchange between cards are not in it")
    return told + stage.cast.notes


def with_speed(machine: Machine, flops: float | None, mfu: float | None, memory: float | None) -> Machine:
    """What the command line says goes over what is known."""
    if flops is not None:
        machine = replace(machine, flops=flops, source="as said by --flops")
    if mfu is not None:
        machine = replace(machine, mfu=mfu)
    return machine if memory is None else replace(machine, memory=memory)
