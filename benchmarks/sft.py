"""SFT on rows of varying length, ours without and with `data.packing` against TRL 1.16's SFTTrainer grouped by length.

Both train on every token of the same texts (16 to 256 tokens, EOS included), 16 rows an optimizer step (packed: as many
tokens), and take turns of several steps. The unit is a token of a row; pads are not counted. Grouping by length, TRL's fastest
setting on a CPU, draws a step's rows from those of like length; ours draws them at random and sorts them within a step. Ours
may also use a quarter of the step as micro-batch (`--micro`); grouped rows gain nothing by it. What comes after `--` goes to
our stage. Prints one JSON line.
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
from _peers import add_peer_option, peer, require
from _sides import best, figures, options, ratio, split, stage, take_turns
from _world import SHAPES, models, words, write_rows

RELEASE = "trl-1.16"
ROWS, SHORTEST, LONGEST, BATCH = 1024, 16, 256, 16
PACKED = round(BATCH * (SHORTEST + LONGEST) / 2 / LONGEST)
"""Sequences with about the tokens of BATCH rows."""
LR = 1e-5


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--modes", nargs="+", choices=("plain", "packed"), default=["plain", "packed"])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="ours; the peer's is fp32")
    parser.add_argument("--steps", type=int, default=8, help="of a turn")
    parser.add_argument("--micro", type=int, nargs="+", help="of ours, to choose the better from (packed: sequences)")
    add_peer_option(parser, RELEASE)
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    versions = require(asked.peer, RELEASE)
    with tempfile.TemporaryDirectory(prefix="sft-", dir=asked.directory) as place:
        sides = measured(asked, asked.directory or Path(place), Path(place), stage_flags)
    settings = {name: getattr(asked, name) for name in ("shape", "precision", "threads")} | {"flags": stage_flags}
    print(json.dumps({"benchmark": "sft"} | settings | {"sides": sides, "peer_versions": versions, "machine": machine()}))


def measured(asked: Any, kept: Path, place: Path, stage_flags: Sequence[str]) -> dict[str, Any]:
    directory, chance, vocabulary = models(kept, asked.shape), random.Random(0), SHAPES[asked.shape]["vocab_size"]
    lengths = (chance.randint(SHORTEST, LONGEST) - 1 for _ in range(ROWS))
    data = write_rows(place / "rows.jsonl", ({"text": words(chance, length, vocabulary)} for length in lengths))
    fields = {
        "model": directory / "policy", "data": data, "json-key": "text", "data.max_length": LONGEST, "threads": asked.threads,
        "precision": asked.precision, "optimizer.lr": LR, "schedule.unit": "steps", "schedule.length": 10000,
        "schedule.decay": "constant", "schedule.warmup": 0, "checkpoint.every": 0,
    }  # fmt: skip
    ours = {}
    for mode in asked.modes:
        batch = PACKED if mode == "packed" else BATCH
        ours[mode] = []
        for micro in asked.micro or [batch, batch // 4]:
            own = {"output": place / f"{mode}-{micro}", "batch_size": batch, "micro_batch_size": micro}
            own |= {"data.packing": "true"} if mode == "packed" else {}
            ours[mode].append(stage(f"{mode}-{micro}", "sft", fields | own, stage_flags, asked.steps))
    job = {"model": directory / "policy", "data": data, "threads": asked.threads, "precision": "fp32", "batch_size": BATCH,
           "max_length": LONGEST, "lr": LR}  # fmt: skip
    trl = peer(f"trl-{BATCH}", asked.peer, "trl_sft.py", job, place, asked.steps)
    sides = [side for each in ours.values() for side in each]
    take_turns([*sides, trl], place, asked.threads, asked.repeats, asked.warm_up)
    unit = {"tokens": lambda turn: turn["tokens"]}
    found = {mode: best([figures(side, unit) for side in each], "tokens") for mode, each in ours.items()}
    against = figures(trl, unit)
    for each in found.values():
        each["over_trl"] = {"tokens": ratio(each, against, "tokens_per_cpu_s")}
        each["memory_over_trl"] = round(each["peak_mib"] / against["peak_mib"], 2)
    return found | {"trl": against}


if __name__ == "__main__":
    main()
