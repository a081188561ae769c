"""What emulating FP8 costs: a training step of the quickstart's model under each recipe, against the plain layers, in one run.

Prints one JSON line: CPU milliseconds of a step with plain layers (median), and each recipe's ratio to it. Steps of all kinds
take turns, so that a busy machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf.config.sections import Fp8
from rlhf.data.chat_world import write_world
from rlhf.fp8.apply import apply
from rlhf.fp8.recipes import SHAPES
from rlhf.fp8.state import advance

ROWS, TOKENS = 32, 32
"""Of a step: the quickstart's batch at the mean length of its rows."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        write_world(Path(directory), seed=0)
        config = AutoConfig.from_pretrained(Path(directory) / "base", trust_remote_code=False)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    ids = torch.randint(0, config.vocab_size, (ROWS, TOKENS))
    steps = {"plain": stepper(plain, None, ids)} | {name: stepper(plain, name, ids) for name in SHAPES}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            began = time.process_time()
            step()
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    ratios = {name: round(value / medians["plain"], 2) for name, value in medians.items() if name != "plain"}
    print(json.dumps({"benchmark": "fp8", "plain_step_ms": round(1000 * medians["plain"], 1), "step_over_plain": ratios}))


def stepper(plain: torch.nn.Module, recipe: str | None, ids: torch.Tensor) -> Callable[[], None]:
    """One optimizer step on the rows, of a copy of the model."""
    model = copy.deepcopy(plain)
    if recipe:
        apply(model, Fp8(recipe=recipe))  # pyright: ignore
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model)

    return step


if __name__ == "__main__":
    main()
