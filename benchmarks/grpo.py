"""One iteration of GRPO or RLOO (rollout, scoring, update), ours against TRL 1.16's trainer, samples per CPU second.

Both get the same model directories, prompts, groups, epochs and reply length, and take turns, one iteration each. No reply ends
early. Prints one JSON line; what comes after `--` goes to our stage.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from _machine import machine
from _peers import add_peer_option, peer, require
from _sides import figures, options, ratio, split, stage, take_turns
from _world import NEVER, SHAPES, models, words, write_rows

RELEASE = "trl-1.16"
BATCH, SAMPLES, PROMPT, REPLY, EPOCHS, KL, LR = 32, 4, 16, 48, 4, 0.05, 1e-6
OURS = {
    "grpo": {"kl.place": "loss", "kl.estimator": "k3", "grpo.aggregation": "replies"},
    "rloo": {"kl.place": "score", "grpo.ratio_of": "reply", "grpo.aggregation": "replies"},
}
"""By estimator, what TRL computes."""


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--estimators", nargs="+", choices=OURS, default=list(OURS))
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    add_peer_option(parser, RELEASE)
    own, stage_flags = split(sys.argv[1:])
    asked = parser.parse_args(own)
    versions, sides = require(asked.peer, RELEASE), {}
    with tempfile.TemporaryDirectory(prefix="grpo-", dir=asked.directory) as place:
        for estimator in asked.estimators:
            sides |= measured(asked, asked.directory or Path(place), Path(place), estimator, stage_flags)
    told = {"shape": asked.shape, "threads": asked.threads, "flags": stage_flags, "sides": sides}
    print(json.dumps({"benchmark": "grpo"} | told | {"peer_versions": versions, "machine": machine()}))


def measured(asked: Any, kept: Path, place: Path, estimator: str, stage_flags: list[str]) -> dict[str, Any]:
    directory, chance = models(kept, asked.shape, NEVER), random.Random(0)
    prompts = ({"prompt": words(chance, PROMPT, SHAPES[asked.shape]["vocab_size"])} for _ in range(1024))
    data = write_rows(place / "prompts.jsonl", prompts)
    fields = {
        "actor": directory / "policy", "reward": directory / "reward", "data": data, "output": place / estimator,
        "threads": asked.threads, "reward.missing_eos": "none", "grpo.estimator": estimator, "grpo.epochs": EPOCHS,
        "rollout.batch_size": BATCH // SAMPLES, "rollout.samples_per_prompt": SAMPLES, "rollout.max_new_tokens": REPLY,
        "rollout.generation_batch_size": BATCH, "grpo.minibatch_size": BATCH, "micro_batch_size": BATCH, "kl.coef": KL,
        "optimizer.lr": LR, "schedule.length": 1000, "schedule.decay": "constant", "schedule.warmup": 0,
        "checkpoint.every": 0,
    } | OURS[estimator]  # fmt: skip
    job = {
        "policy": directory / "policy", "reward": directory / "reward", "data": data, "threads": asked.threads,
        "precision": "fp32", "estimator": estimator, "batch_size": BATCH, "samples": SAMPLES, "reply_tokens": REPLY,
        "epochs": EPOCHS, "kl_coef": KL, "lr": LR,
    }  # fmt: skip
    ours = stage(f"{estimator}-{BATCH}", "grpo", fields, stage_flags)
    theirs = peer(f"trl-{estimator}-{BATCH}", asked.peer, "trl_grpo.py", job, place, steps=EPOCHS)
    take_turns([ours, theirs], place, asked.threads, asked.repeats, asked.warm_up)
    found, against = (figures(side, {"samples": lambda _: BATCH}) for side in (ours, theirs))
    found["over_trl"] = {"samples": ratio(found, against, "samples_per_cpu_s")}
    found["memory_over_trl"] = round(found["peak_mib"] / against["peak_mib"], 2)
    return {estimator: found, f"trl {estimator}": against}


if __name__ == "__main__":
    main()
