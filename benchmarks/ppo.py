"""One PPO iteration (rollout, scoring, update), ours in each mode against TRL 1.12's PPOTrainer, samples per CPU second.

Both get the same model directories, prompts, batch, epochs, reply length and learning rate, and take turns, one iteration each.
`--lengths fixed`: no reply ends early; `varying`: EOS has a probability of 1 / REPLY at each token, so replies are 0.63 REPLY
long on average, and as each side samples its own, figures are given per token too. With `varying` each side may also use a
quarter of the batch as micro-batch, and its better one is reported (`--micro`). What comes after `--` goes to our stage:

    python benchmarks/ppo.py --modes shared frozen --precision fp32 bf16 -- --frozen_layers 3

Modes, by what is trained: `separate`, actor and critic with a trunk each, as TRL has them; `shared`, one trunk with two heads;
`adapters`, LoRA of rank 8 on one base for all roles; `frozen`, `shared` with the lower half of the layers frozen. Prints one
JSON line.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _machine import machine
from _peers import add_peer_option, peer, require
from _sides import Side, Turn, best, figures, options, ratio, split, spread, stage, take_turns
from _world import NEVER, RANK, SHAPES, models, words, write_rows

RELEASE = "trl-1.12"


@dataclass(frozen=True)
class Size:
    batch: int
    prompt: int
    reply: int
    """Tokens."""
    epochs: int = 4


SIZES = {"tiny": Size(32, 16, 48), "tiny-49k": Size(32, 16, 48), "smollm2": Size(8, 32, 32)}
MODES = {
    "separate": {"roles.mode": "separate"},
    "shared": {"roles.mode": "shared"},
    "adapters": {"roles.mode": "adapters", "lora.rank": RANK},
    "frozen": {"roles.mode": "shared"},
}
LR, KL = 1e-6, 0.05
PROMPTS = 1024


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32"], help="ours")
    parser.add_argument("--peer-precision", choices=("fp32", "bf16", "none"), default="fp32", help="none: without the peer")
    parser.add_argument("--lengths", choices=("fixed", "varying"), default="fixed")
    parser.add_argument("--shape", choices=SIZES, default="tiny")
    parser.add_argument("--micro", type=int, nargs="+", help="micro-batches to choose the better from, of both sides")
    parser.add_argument("--together", type=int, help="of our sides at a time with the peer (default: all; smollm2: 1)")
    add_peer_option(parser, RELEASE)
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    versions = {} if asked.peer_precision == "none" else require(asked.peer, RELEASE)
    with tempfile.TemporaryDirectory(prefix="ppo-", dir=asked.directory) as place:
        result = measured(asked, asked.directory or Path(place), Path(place), stage_flags)
    settings = {name: getattr(asked, name) for name in ("shape", "lengths", "threads")} | {"flags": stage_flags}
    print(json.dumps({"benchmark": "ppo"} | settings | result | {"peer_versions": versions, "machine": machine()}))


def measured(asked: Any, kept: Path, place: Path, stage_flags: Sequence[str]) -> dict[str, Any]:
    size, stops = SIZES[asked.shape], asked.lengths == "varying"
    directory = models(kept, asked.shape, 1 / size.reply if stops else NEVER)
    chance, vocabulary = random.Random(0), SHAPES[asked.shape]["vocab_size"]
    prompts = ({"prompt": words(chance, size.prompt, vocabulary)} for _ in range(PROMPTS))
    data = write_rows(place / "prompts.jsonl", prompts)
    micros = asked.micro or ([size.batch, size.batch // 4] if stops else [size.batch])

    ours: list[list[Side]] = []
    for mode in asked.modes:
        for precision in asked.precision:
            name = f"{mode}-{precision}"
            sides = []
            for micro in micros:
                fields = stage_fields(asked, size, directory, mode, precision, micro)
                fields |= {"data": data, "output": place / f"{name}-{micro}"}
                sides.append(stage(f"{name}-{micro}", "ppo", fields, stage_flags))
            ours.append(sides)
    job = {"policy": directory / "policy", "reward": directory / "reward", "data": data, "threads": asked.threads,
           "precision": asked.peer_precision, "batch_size": size.batch, "epochs": size.epochs, "reply_tokens": size.reply,
           "stops": stops, "kl_coef": KL, "lr": LR}  # fmt: skip

    sides, together = {}, asked.together or (1 if asked.shape == "smollm2" else len(ours))
    for first in range(0, len(ours), together):
        group = ours[first : first + together]
        theirs = [
            peer(f"trl-{asked.peer_precision}-{micro}", asked.peer, "trl_ppo.py", job | {"micro_batch_size": micro}, place)
            for micro in micros
            if asked.peer_precision != "none"
        ]
        take_turns([side for each in [*group, theirs] for side in each], place, asked.threads, asked.repeats, asked.warm_up)
        against = best([described(side, size) for side in theirs], "tokens") if theirs else None
        for each in group:
            found = best([described(side, size) for side in each], "tokens")
            if against:
                found["over_trl"] = {unit: ratio(found, against, f"{unit}_per_cpu_s") for unit in ("samples", "tokens")}
                found["memory_over_trl"] = round(found["peak_mib"] / against["peak_mib"], 2)
            sides[each[0].name.rpartition("-")[0]] = found
        if against:
            sides.setdefault("trl", []).append(against)
    return {"sides": sides, "size": vars(size), "micro": micros}


def stage_fields(asked: Any, size: Size, directory: Path, mode: str, precision: str, micro: int) -> dict[str, Any]:
    frozen = {"frozen_layers": SHAPES[asked.shape]["num_hidden_layers"] // 2} if mode == "frozen" else {}
    return {
        "actor": directory / "policy", "reward": directory / ("reward-adapter" if mode == "adapters" else "reward"),
        "threads": asked.threads, "precision": precision, "micro_batch_size": micro, "reward.missing_eos": "none",
        "rollout.batch_size": size.batch, "rollout.generation_batch_size": size.batch, "rollout.max_new_tokens": size.reply,
        "ppo.minibatch_size": size.batch, "ppo.epochs": size.epochs, "kl.coef": KL, "optimizer.lr": LR,
        "optimizer.critic_lr": LR, "schedule.length": 1000, "schedule.decay": "constant", "schedule.warmup": 0,
        "checkpoint.every": 0,
    } | MODES[mode] | frozen  # fmt: skip


def described(side: Side, size: Size) -> dict[str, Any]:
    """Figures of a side, per sample and per token of the replies, with the mean length of these."""

    def reply_tokens(turn: Turn) -> float:
        return turn["reply_tokens"] if "reply_tokens" in turn else turn["tokens"] - size.batch * size.prompt

    result = figures(side, {"samples": lambda _: size.batch, "tokens": reply_tokens})
    result["reply_length"] = round(sum(map(reply_tokens, side.turns)) / (size.batch * len(side.turns)), 1)
    names = sorted({name for turn in side.turns for name in turn["phases"]})
    return result | {"phases_cpu_s": {name: spread(turn["phases"].get(name, 0.0) for turn in side.turns) for name in names}}


if __name__ == "__main__":
    main()
