"""Peak memory of PPO: roles.mode `adapters` against `separate`, and `separate` against TRL 1.12's PPOTrainer.

The models are Llamas of SmolLM2-135M's shape, random weights in float32. 4 prompts of 16 tokens, replies of 16, micro-batches
of 1, gradient checkpointing as in configs/ppo.yaml; one thread. `adapters` and `separate` have LoRA of rank 8 and a reward
model that is an adapter on the same base; `separate_without_lora` and `trl` train all weights of actor and critic and have a
reward model of its own weights. Each run is a process of its own, one after the other; its peak is ru_maxrss from the imports
to the end of its second iteration. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from pathlib import Path

from _machine import machine
from _peers import add_peer_option, peer, require
from _sides import Side, stage, take_turns
from _world import RANK, SHAPES, models, words, write_rows

RELEASE, SHAPE = "trl-1.12", "smollm2"
PROMPTS, PROMPT_TOKENS, REPLY_TOKENS = 4, 16, 16
LORA = {"lora.rank": RANK}
RUNS = {
    "adapters": ({"roles.mode": "adapters"} | LORA, "reward-adapter"),
    "separate": ({"roles.mode": "separate"} | LORA, "reward-adapter"),
    "separate_without_lora": ({"roles.mode": "separate"}, "reward"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, help="where to work; models found there are used again (default: temporary)")
    parser.add_argument("--modes", nargs="+", choices=[*RUNS, "trl"], default=[*RUNS, "trl"])
    add_peer_option(parser, RELEASE)
    asked = parser.parse_args()
    versions = require(asked.peer, RELEASE) if "trl" in asked.modes else {}
    with tempfile.TemporaryDirectory(prefix="memory-", dir=asked.directory) as place:
        sides = prepared(asked.directory or Path(place), Path(place), asked.peer)
        peaks = {name: peak(sides[name], Path(place)) for name in asked.modes}
    ratios = {"adapters_over_separate": ("adapters", "separate"), "separate_over_trl": ("separate_without_lora", "trl")}
    found = {name: round(peaks[one] / peaks[other], 3) for name, (one, other) in ratios.items() if {one, other} <= {*peaks}}
    told = {"benchmark": "memory", "peak_mib": peaks} | found | {"peer_versions": versions, "machine": machine()}
    print(json.dumps(told))


def prepared(kept: Path, place: Path, python: Path) -> dict[str, Side]:
    directory, chance = models(kept, SHAPE), random.Random(0)
    prompt = words(chance, PROMPT_TOKENS, SHAPES[SHAPE]["vocab_size"])
    data = write_rows(place / "prompts.jsonl", ({"prompt": prompt} for _ in range(4 * PROMPTS)))
    fields = {
        "actor": directory / "policy", "critic": "zero", "data": data, "threads": 1, "gradient_checkpointing": "true",
        "schedule.length": 1000, "checkpoint.every": 0, "micro_batch_size": 1, "ppo.epochs": 1, "rollout.batch_size": PROMPTS,
        "ppo.minibatch_size": PROMPTS, "rollout.max_new_tokens": REPLY_TOKENS, "rollout.generation_batch_size": 1,
    }  # fmt: skip
    sides = {
        name: stage(name, "ppo", fields | own | {"reward": directory / reward, "output": place / name})
        for name, (own, reward) in RUNS.items()
    }
    job = {
        "policy": directory / "policy", "reward": directory / "reward", "data": data, "threads": 1, "precision": "fp32",
        "gradient_checkpointing": True, "batch_size": PROMPTS, "micro_batch_size": 1, "rollout_batch_size": 1, "epochs": 1,
        "reply_tokens": REPLY_TOKENS, "stops": False, "kl_coef": 0.05, "lr": 1e-6,
    }  # fmt: skip
    return sides | {"trl": peer("trl", python, "trl_ppo.py", job, place)}


def peak(side: Side, place: Path) -> int:
    """MiB"""
    take_turns([side], place, threads=1, repeats=1, warm_up=1)
    return max(turn["peak_mib"] for turn in side.turns)


if __name__ == "__main__":
    main()
