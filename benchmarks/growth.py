"""How the CPU seconds of one PPO sample grow with the model, the sequence and the number of processes.

Around one point (a Llama 256 wide, 4 layers; 8 prompts of 16 tokens, replies of 48; one process of one thread) one thing
changes at a time: the width, the tokens of a sequence, or the processes, whose CPU seconds are added up. All points of a curve
take turns, one iteration each. Prints one JSON line; `benchmarks/table.py` draws it, log-log. What comes after `--` goes to our
stage.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _machine import machine
from _sides import Side, options, split, spread, stage, take_turns
from _world import NEVER, SHAPES, models, words, write_rows

BATCH, PROMPT, EPOCHS = 8, 16, 4
SHAPE, LENGTH, PROCESSES = "tiny", 64, 1
CURVES = {
    "hidden_size": [(name, LENGTH, PROCESSES) for name in ("tiny-h128", "tiny", "tiny-h384", "tiny-h512", "tiny-h768")],
    "sequence_length": [(SHAPE, length, PROCESSES) for length in (32, 64, 128, 256, 512)],
    "processes": [(SHAPE, LENGTH, count) for count in (1, 2)],
}
Point = tuple[str, int, int]


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--mode", choices=("separate", "shared"), default="separate")
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    with tempfile.TemporaryDirectory(prefix="growth-", dir=asked.directory) as place:
        curves = {
            name: measured(asked, asked.directory or Path(place), Path(place), name, stage_flags) for name in asked.curves
        }
    told = {"mode": asked.mode, "threads": asked.threads, "flags": stage_flags, "batch": BATCH}
    print(json.dumps({"benchmark": "growth"} | told | {"curves": curves, "machine": machine()}))


def measured(asked: Any, kept: Path, place: Path, name: str, stage_flags: Sequence[str]) -> list[dict[str, Any]]:
    sides = [side(asked, kept, place / name, point, stage_flags) for point in CURVES[name]]
    take_turns(sides, place, asked.threads, asked.repeats, asked.warm_up)
    return [
        {"at": value(name, point), "cpu_s_per_sample": spread((turn["cpu_s"] / BATCH for turn in each.turns), 4)}
        for point, each in zip(CURVES[name], sides, strict=True)
    ]


def value(curve: str, point: Point) -> int:
    shape, length, processes = point
    return {"hidden_size": SHAPES[shape]["hidden_size"], "sequence_length": length, "processes": processes}[curve]


def side(asked: Any, kept: Path, place: Path, point: Point, stage_flags: Sequence[str]) -> Side:
    shape, length, processes = point
    directory, chance = models(kept, shape, NEVER), random.Random(0)
    name, vocabulary = f"{shape}-{length}-{processes}", SHAPES[shape]["vocab_size"]
    data = write_rows(place / "prompts.jsonl", ({"prompt": words(chance, PROMPT, vocabulary)} for _ in range(16 * BATCH)))
    fields = {
        "actor": directory / "policy", "reward": directory / "reward", "data": data, "output": place / name,
        "roles.mode": asked.mode, "threads": asked.threads, "reward.missing_eos": "none", "rollout.batch_size": BATCH,
        "rollout.max_new_tokens": length - PROMPT, "ppo.minibatch_size": BATCH, "ppo.epochs": EPOCHS,
        "micro_batch_size": BATCH, "optimizer.lr": 1e-6, "optimizer.critic_lr": 1e-6, "schedule.length": 1000,
        "schedule.decay": "constant", "schedule.warmup": 0, "checkpoint.every": 0,
    }  # fmt: skip
    return stage(name, "ppo", fields, stage_flags, processes=processes)


if __name__ == "__main__":
    main()
