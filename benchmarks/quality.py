"""Time to quality: CPU seconds of PPO until 70% of the quickstart's replies are helpful, ours in each mode against TRL 1.12.

For each seed `rlhf run` makes one SFT model and one reward model (configs/quickstart/, kept in `--directory`). From these start
our PPO in each mode and TRL's PPOTrainer: the same prompts as token ids, iterations, batch, optimizer steps, epochs, reply
length, KL coefficient, Adam, and linear schedule with warm-up. Each evaluates itself every few iterations in the same way:
replies to the held-out prompts sampled at temperature 1, judged by the chat world's exact scorer; that costs neither side
anything. Sides take turns, one iteration each.

What differs: TRL has no warm-up of the critic, no score normalisation and one learning rate for policy and critic, so `--lrs`
are tried on the first seed (ours, a half and twice of it) and the best goes on to the others. Prints one JSON line, the curves
(CPU seconds, iteration, helpful rate, KL in nats) in it. What comes after `--` goes to our stage.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from _machine import machine
from _peers import add_peer_option, peer, require
from _sides import HERE, Side, environment, options, split, spread, stage, take_turns

RELEASE = "trl-1.12"
CONFIGS = HERE.parent / "configs" / "quickstart"
CONFIG = yaml.safe_load((CONFIGS / "ppo.yaml").read_text())
MODES = {
    "separate": {},
    "shared": {"roles.mode": "shared"},
    "frozen": {"roles.mode": "shared", "frozen_layers": 1},
}
"""`frozen`: one of three layers. Left out: `adapters`, whose reward model would be another one, an adapter."""


def main() -> None:
    parser = options(__doc__)
    for unused in ("--repeats", "--warm-up"):
        parser.set_defaults(**{unused.strip("-").replace("-", "_"): 1})
    parser.add_argument("--modes", nargs="*", choices=MODES, default=list(MODES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lrs", type=float, nargs="*", help="of TRL; none: without TRL")
    parser.add_argument("--target", type=float, default=0.7, help="helpful rate")
    parser.add_argument("--every", type=int, default=4, help="iterations between evaluations")
    parser.add_argument("--length", type=int, default=CONFIG["schedule"]["length"], help="iterations")
    add_peer_option(parser, RELEASE)
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    lr = CONFIG["optimizer"]["lr"]
    lrs = [lr, lr / 2, 2 * lr] if asked.lrs is None else asked.lrs
    versions = require(asked.peer, RELEASE) if lrs else {}
    curves: dict[str, dict[int, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="quality-", dir=asked.directory) as place:
        for seed in asked.seeds:
            found = one_seed(asked, asked.directory or Path(place), Path(place), seed, lrs, stage_flags)
            for name, curve in found.items():
                curves.setdefault(name, {})[seed] = curve
            if len(lrs) > 1:
                lrs = [min(lrs, key=lambda each: seconds_to(curves[f"trl-{each:g}"][asked.seeds[0]], asked.target))]
    told = {"target": asked.target, "flags": stage_flags, "trl_lr": lrs[0] if lrs else None, "threads": asked.threads}
    print(json.dumps({"benchmark": "quality"} | told | summary(curves, asked, lrs) | {"curves": curves}
                     | {"peer_versions": versions, "machine": machine()}))  # fmt: skip


def one_seed(
    asked: Any, kept: Path, place: Path, seed: int, lrs: Sequence[float], stage_flags: Sequence[str]
) -> dict[str, list[dict[str, float]]]:
    """The curve of each side."""
    start = models(kept, seed)
    fields = {
        "config": CONFIGS / "ppo.yaml", "actor": start / "sft", "reward": start / "rm", "seed": seed, "threads": asked.threads,
        "data": start / "world" / "prompts.jsonl", "data.eval": start / "world" / "prompts_heldout.jsonl",
        "eval.every": asked.every, "checkpoint.every": 0, "schedule.length": asked.length,
    }  # fmt: skip
    sides = [
        stage(name, "ppo", fields | MODES[name] | {"output": place / f"{name}-{seed}"}, stage_flags) for name in asked.modes
    ]
    sides += [peer(f"trl-{lr:g}", asked.peer, "trl_ppo.py", job(asked, start, lr, seed), place) for lr in lrs]
    # One turn more than there are iterations: the last evaluation is told after them.
    take_turns(sides, place, asked.threads, asked.length, warm_up=1)
    return {side.name: curve(side) for side in sides}


def models(kept: Path, seed: int) -> Path:
    """The directory of the world, the SFT run and the reward model of a seed; what is done there is kept."""
    pipeline = yaml.safe_load((CONFIGS / "pipeline.yaml").read_text())
    output = kept / f"quickstart-{seed}"
    output.mkdir(parents=True, exist_ok=True)
    del pipeline["stages"]["ppo"]
    for name, flags in pipeline["stages"].items():
        flags["config"] = str(CONFIGS / f"{name}.yaml")
    file = kept / f"quickstart-{seed}.yaml"
    file.write_text(yaml.safe_dump(pipeline | {"output": str(output)}))
    command = [sys.executable, "-m", "rlhf", "run", str(file), "--seed", str(seed)]
    subprocess.run(command, env=environment(1), check=True, stdout=subprocess.DEVNULL)
    return output


def job(asked: Any, start: Path, lr: float, seed: int) -> dict[str, Any]:
    ppo, schedule = CONFIG["ppo"], CONFIG["schedule"]
    batch = CONFIG["rollout"]["batch_size"]
    return {
        "policy": start / "sft" / "model", "reward": start / "rm" / "model", "data": start / "world" / "prompts.jsonl",
        "held_out": start / "world" / "prompts_heldout.jsonl", "samples": CONFIG["eval"]["samples_per_prompt"],
        "evaluate_every": asked.every, "length": asked.length, "threads": asked.threads, "precision": "fp32", "lr": lr,
        # With micro-batches TRL would take an optimizer step once per accumulation, not per minibatch.
        "batch_size": batch, "micro_batch_size": batch, "epochs": ppo["epochs"],
        "reply_tokens": CONFIG["rollout"]["max_new_tokens"], "stops": True, "kl_coef": CONFIG["kl"]["coef"],
        "more": {
            "num_mini_batches": batch // ppo["minibatch_size"], "seed": seed, "adam_beta2": 0.95, "adam_epsilon": 1e-5,
            "missing_eos_penalty": -CONFIG["reward"]["missing_eos_value"], "lr_scheduler_type": "linear",
            "warmup_steps": round(schedule["warmup"] * asked.length),
        },
    }  # fmt: skip


def curve(side: Side) -> list[dict[str, float]]:
    steps = [*side.warm_up, *side.turns]
    spent = [0.0]
    for step in steps:
        spent.append(spent[-1] + step["cpu_s"])
    points = {point["step"]: point for step in steps for point in step.get("evaluations", [])}
    return [
        {"cpu_s": round(spent[step], 3), "iteration": step, "helpful": point["helpful"], "kl": point["kl"]}
        for step, point in points.items()
    ]


def seconds_to(points: Sequence[dict[str, float]], target: float) -> float:
    """CPU seconds to the first evaluation at the target, on the line from the one before it; infinity where there is none."""
    before = {"cpu_s": 0.0, "helpful": 0.0}
    for point in points:
        if point["helpful"] >= target:
            part = (target - before["helpful"]) / (point["helpful"] - before["helpful"])
            return before["cpu_s"] + part * (point["cpu_s"] - before["cpu_s"])
        before = point
    return math.inf


def summary(curves: dict[str, dict[int, list[dict[str, float]]]], asked: Any, lrs: Sequence[float]) -> dict[str, Any]:
    """CPU seconds to the target of each side and seed, and where all seeds reach it their median and its ratio to TRL's."""
    sides: dict[str, dict[str, Any]] = {}
    for name, of_seed in curves.items():
        seconds = {seed: seconds_to(points, asked.target) for seed, points in of_seed.items()}
        reached = [value for value in seconds.values() if value < math.inf]
        sides[name] = {
            "cpu_s_to_target": {seed: round(value, 1) if value < math.inf else None for seed, value in seconds.items()},
            "reached": f"{len(reached)} of {len(seconds)}",
            "helpful_at_end": spread(points[-1]["helpful"] for points in of_seed.values()),
            "kl_at_end": spread(points[-1]["kl"] for points in of_seed.values()),
            "cpu_s_at_end": spread((points[-1]["cpu_s"] for points in of_seed.values()), 1),
        }
        if len(reached) == len(asked.seeds):
            sides[name]["cpu_s"] = spread(reached, 1)
    against = sides.get(f"trl-{lrs[0]:g}", {}).get("cpu_s") if lrs else None
    for found in sides.values():
        if against and "cpu_s" in found:
            found["trl_over_it"] = round(against["median"] / found["cpu_s"]["median"], 2)
    return {"sides": sides}


if __name__ == "__main__":
    main()
