"""The reward model on pairs, ours against TRL 1.16's RewardTrainer, pairs per CPU second.

Both sides of a pair answer the same prompt of `--prompt` tokens with replies of `--reply` tokens on average (a quarter to seven
quarters of it, EOS included). Both trainers get the same token ids, 16 pairs an optimizer step, and take turns of several
steps. Ours may also use a quarter of the step as micro-batch (`--micro`). What comes after `--` goes to our stage. Prints one
JSON line.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from _machine import machine
from _peers import add_peer_option, peer, require
from _sides import best, figures, options, ratio, split, stage, take_turns
from _world import SHAPES, models, words, write_rows

RELEASE = "trl-1.16"
PAIRS, BATCH, LR = 1024, 16, 1e-5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="ours; the peer's is fp32")
    parser.add_argument("--prompt", type=int, default=48, help="tokens; at least 1")
    parser.add_argument("--reply", type=int, default=16, help="tokens, mean")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--micro", type=int, nargs="+", default=[BATCH, BATCH // 4], help="of ours, to choose the better from")
    add_peer_option(parser, RELEASE)
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    versions = require(asked.peer, RELEASE)
    with tempfile.TemporaryDirectory(prefix="rm-", dir=asked.directory) as place:
        sides = measured(asked, asked.directory or Path(place), Path(place), stage_flags)
    settings = {name: getattr(asked, name) for name in ("shape", "precision", "prompt", "reply", "threads")}
    told = {"flags": stage_flags, "sides": sides, "peer_versions": versions, "machine": machine()}
    print(json.dumps({"benchmark": "rm"} | settings | told))


def measured(asked: Any, kept: Path, place: Path, stage_flags: Sequence[str]) -> dict[str, Any]:
    directory = models(kept, asked.shape)
    data = write_rows(place / "pairs.jsonl", pairs(asked.prompt, asked.reply, SHAPES[asked.shape]["vocab_size"]))
    fields = {
        "model": directory / "reward", "data": data, "threads": asked.threads, "precision": asked.precision,
        "batch_size": BATCH, "optimizer.lr": LR, "schedule.unit": "steps", "schedule.length": 10000,
        "schedule.decay": "constant", "schedule.warmup": 0, "checkpoint.every": 0,
    }  # fmt: skip
    ours = [
        stage(f"ours-{micro}", "rm", fields | {"output": place / f"ours-{micro}", "micro_batch_size": micro}, stage_flags,
              asked.steps)
        for micro in asked.micro
    ]  # fmt: skip
    job = {"model": directory / "reward", "data": data, "threads": asked.threads, "precision": "fp32", "batch_size": BATCH,
           "lr": LR}  # fmt: skip
    trl = peer(f"trl-{BATCH}", asked.peer, "trl_reward.py", job, place, asked.steps)
    take_turns([*ours, trl], place, asked.threads, asked.repeats, asked.warm_up)
    unit = {"pairs": lambda _: BATCH * asked.steps, "tokens": lambda turn: turn["tokens"]}
    found, against = best([figures(side, unit) for side in ours], "pairs"), figures(trl, unit)
    found["over_trl"] = {"pairs": ratio(found, against, "pairs_per_cpu_s")}
    found["memory_over_trl"] = round(found["peak_mib"] / against["peak_mib"], 2)
    return {"ours": found, "trl": against}


def pairs(prompt: int, reply: int, vocabulary: int) -> Iterator[dict[str, str]]:
    chance = random.Random(0)

    def answer() -> str:
        length = chance.randint(max(2, reply // 4), 2 * reply - max(2, reply // 4))
        return words(chance, length - 1, vocabulary)  # and EOS

    for _ in range(PAIRS):
        asked = words(chance, prompt, vocabulary)
        yield {"prompt": asked, "chosen": f" {answer()}", "rejected": f" {answer()}"}


if __name__ == "__main__":
    main()
