"""What a stage that has just ended says: where its result is, what came of it, and which command is next."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from rlhf import paths
from rlhf.config.parse import Invocation
from rlhf.runs.lineage import run_of
from rlhf.runs.manifest import MANIFEST, read_json

FIGURES = {
    "sft": ("eval/loss", "loss"),
    "rm": ("eval/accuracy", "loss"),
    "dpo": ("eval/accuracy", "loss"),
    "kto": ("eval/accuracy", "loss"),
    "ppo": ("eval/score", "reward/score"),
    "grpo": ("eval/score", "reward/score"),
}
"""Metrics of metrics.jsonl: of held-out rows, and, where there are none, of the rows that were learned from."""


def outcome(run: Path) -> str:
    """`done: runs/sft/model; eval/loss 2.055 -> 2.010`: the first figure and the last, with its 95% interval if it has one."""
    stage = read_json(run / MANIFEST)["stage"]
    file = run / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []  # a recipe of the user's may write none
    records = [json.loads(line) for line in lines]
    for name in FIGURES[stage]:
        if found := [record for record in records if name in record]:
            values = [f"{record[name]:.4g}" for record in (found[:1] if len(found) > 1 else []) + found[-1:]]
            low, high = (found[-1].get(f"{name}_{end}") for end in ("low", "high"))
            interval = "" if low is None or high is None else f" (95%: {low:.3f} to {high:.3f})"
            return f"done: {run / 'model'}; {name} {' -> '.join(values)}{interval}"
    return f"done: {run / 'model'}"


def next_command(invocation: Invocation[Any]) -> str:
    """The command that most often comes after; words in capitals are for the user to replace."""
    run = shlex.quote(invocation.config.output)
    if invocation.stage == "sft":
        return f"rlhf rm --config {_sibling(invocation, 'rm')} --model {run} --data PAIRS"
    if invocation.stage == "rm":
        base = invocation.config.model.path
        actor = shlex.quote(base) if run_of(base) is not None else "SFT"
        return f"rlhf ppo --config {_sibling(invocation, 'ppo')} --actor {actor} --reward {run} --data PROMPTS"
    return f"rlhf report {run}"


def _sibling(invocation: Invocation[Any], stage: str) -> str:
    """The config of another stage that lies beside this one's; where none does, the shipped one."""
    if invocation.config_file is None or not (file := invocation.config_file.with_name(f"{stage}.yaml")).is_file():
        return stage
    return shlex.quote(str(file.relative_to(paths.CONFIGS).with_suffix("") if file.is_relative_to(paths.CONFIGS) else file))
