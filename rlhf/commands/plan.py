"""`rlhf plan`: what a stage will take, before it takes it."""

from __future__ import annotations

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from rlhf.commands import STAGES
from rlhf.config.arguments import Parser, positive
from rlhf.errors import ConfigError, UsageError

if TYPE_CHECKING:
    from rlhf.config.parse import Invocation
    from rlhf.training.plan.machines import Machine

USAGE = """\
rlhf plan STAGE [--gpus N] [--card NAME] [--gpu-memory 80GB] [--flops N] [--mfu PART] [--price-per-hour N] [--rows N]
                [--measure] [--json] [every flag of `rlhf STAGE`]

  Memory of one process, by what for; whether it fits, the largest micro-batch that does, and what to turn if none; the same
  under each engine (--launch); time and cost; how many cards. Weights are not read, nothing is written (docs/planning.md).
  --gpus N            cards, one process each (as --nproc); without it and --card, this machine
  --card NAME         a card by name, H100 say: its memory and speed; --gpu-memory and --flops (per second) go over them
  --mfu PART          part of that speed that is reached (0.4 on cards)
  --price-per-hour N  of one card
  --rows N            rows of the data, each as long as the config allows; without it the file itself is read
  --measure           runs the first steps of the stage on this machine, and puts what they took beside the plan"""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("stage", choices=tuple(STAGES))
    parser.add_argument("--gpus", type=positive)
    parser.add_argument("--card")
    parser.add_argument("--gpu-memory")
    parser.add_argument("--flops", type=_above_zero)
    parser.add_argument("--mfu", type=_above_zero)
    parser.add_argument("--price-per-hour", type=_above_zero)
    parser.add_argument("--rows", type=positive)
    parser.add_argument("--measure", action="store_true")
    given, stage_flags = parser.parse_known_args(argv)
    if given.mfu and given.mfu > 1:
        raise UsageError(f"--mfu {given.mfu:g}: expected a part of 1, as in 0.4")

    from rlhf.config.parse import parse
    from rlhf.training.plan import lines

    invocation = parse(given.stage, [*stage_flags, *_processes(given, stage_flags)])
    if given.measure and (given.gpus or given.card or given.gpu_memory):
        raise UsageError("--measure runs here: leave out --gpus, --card and --gpu-memory")
    if "OMP_NUM_THREADS" not in os.environ and invocation.config.threads:
        os.environ["OMP_NUM_THREADS"] = str(invocation.config.threads)
    plan = planned(invocation, given)
    if given.measure:
        plan["measured"] = measured(invocation, plan)
    if invocation.as_json:
        print(json.dumps(plan, indent=2))
    else:
        lines.show(plan)
    return 0


def planned(invocation: Invocation[Any], given: argparse.Namespace) -> dict[str, Any]:
    from rlhf.runs.launch import engine_of, machines_of
    from rlhf.runs.launch_file import find_launch_file, read_launch_file
    from rlhf.training.plan.advice import Asked, answer

    processes = invocation.nproc or 1
    if invocation.nproc is None and invocation.launch not in ("auto", "cpu"):
        processes = read_launch_file(find_launch_file(invocation.launch), 1).num_processes
    machines_of(invocation.launch, invocation.machines)
    engine = engine_of(invocation.launch)
    if processes == 1 and engine.divides:
        raise ConfigError(f"--launch {invocation.launch}: one process has nobody to divide with: give --gpus 2 or more")
    return answer(invocation, _machine(invocation.config, given), Asked(processes, given.price_per_hour, given.rows))


def measured(invocation: Invocation[Any], plan: dict[str, Any]) -> dict[str, Any]:
    from dataclasses import asdict

    from rlhf.config.schema import PolicyStage
    from rlhf.training.plan.lines import size
    from rlhf.training.plan.probe import ITERATIONS, MEMORY_STEPS, STEPS, measure

    on_cpu = plan["machine"]["kind"] == "cpu"
    steps = ITERATIONS if isinstance(invocation.config, PolicyStage) else STEPS
    as_it_is = measure(invocation, steps, give_back=False)
    told = measure(invocation, MEMORY_STEPS, give_back=True) if on_cpu else as_it_is
    run, peak = plan["run"], plan["memory"]["peak"]
    seconds = as_it_is.seconds_per_step * run["steps"]
    lines = [
        f"peak {size(told.peak)} beyond the {size(told.base)} of a process without weights; planned {size(peak)}, "
        f"{peak / told.peak - 1:+.0%}"
        + (" (freed memory given back at once; as it is, glibc holds " + f"{size(as_it_is.peak)})" if on_cpu else ""),
        f"{as_it_is.tokens_per_second:,.0f} tokens/s, {as_it_is.seconds_per_step:.3g} s a step, over {as_it_is.steps} steps "
        f"without the first; the whole run at that speed: {lines_clock(seconds)}, planned {lines_clock(run['seconds'])}",
    ]
    return {"peak": told.peak, "as_it_is": asdict(as_it_is), "planned_peak": peak, "seconds": seconds, "lines": lines}


def lines_clock(seconds: float | None) -> str:
    from rlhf.training.plan.lines import clock

    return clock(seconds) or "not known"


def _machine(config: Any, given: argparse.Namespace) -> Machine:
    from dataclasses import replace

    from rlhf.training.plan.advice import with_speed
    from rlhf.training.plan.machines import Machine, bytes_in, described, this_machine

    memory = bytes_in(given.gpu_memory, "--gpu-memory") if given.gpu_memory else None
    fp8 = config.fp8.recipe != "none"
    if given.card:
        machine = described(given.card, config.precision, fp8)
    elif given.gpus or memory:
        machine = Machine("GPU", "cuda", None, None, None, 0.4, "not said")
    else:
        machine = this_machine(config.precision, fp8)
    return replace(with_speed(machine, given.flops, given.mfu, memory))


def _processes(given: argparse.Namespace, stage_flags: list[str]) -> list[str]:
    if not given.gpus:
        return []
    if any(flag.split("=")[0] == "--nproc" for flag in stage_flags):
        raise UsageError("--gpus and --nproc say the same: give one of them")
    return ["--nproc", str(given.gpus)]


def _above_zero(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return number
