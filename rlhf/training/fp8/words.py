"""The words of `rlhf fp8 ...`. All that are not its own are flags of `rlhf sft`: model, data and FP8 are set as there.

Nothing here imports torch; a mistake is said at once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf.config.arguments import Parser, positive
from rlhf.config.parse import parse
from rlhf.config.schema import SftConfig
from rlhf.errors import UsageError

USAGE = """\
rlhf fp8 plan MODEL                [--recipe NAME] [--fp8.FIELD VALUE ...] [--json]
rlhf fp8 inspect MODEL --data FILE [--recipe NAME] [--rows N] [--heatmap FILE.png] [--SFT.FIELD VALUE ...] [--json]
rlhf fp8 bisect MODEL --data FILE  [--recipe NAME] [--rows N] [--SFT.FIELD VALUE ...] [--json]
rlhf fp8 probe [--config sft] --model MODEL --data FILE [--steps N] [--seeds N] [--recipes NAME,...] [--SFT.FIELD VALUE ...]
               [--json]

  plan      which layers would run in FP8, and why the others would not; reads config.json, no weights
  inspect   per layer and operand: largest magnitude, scale, what becomes 0, what is cut off, SQNR, cosine; for all recipes
  probe     short SFT runs with FP8 and without, same weights and batches, compared with the spread of seeds; exit 1 where a
            recipe's loss is further off than 0.2% and twice that spread
  bisect    the layers, and which of their products, that carry the error: a list for --fp8.keep; every layer is put in FP8
            alone, so it takes as many passes over the rows as there are layers, times three
  --recipe NAME             delayed, current, block, rowwise or mxfp8 (default: the config's, else block)
  --rows N                  rows of the file to look at (default: 16)
  --steps N, --seeds N      length of a run and how many (default: 200, 3)
  --recipes NAME,...        recipes to try (default: that of --recipe)
  Fields of `rlhf sft` are flags here too: --fp8.block_scales fp32, --data.max_length 512, --precision bf16, --lora.rank 8."""

ACTIONS = ("plan", "inspect", "bisect", "probe")


def run(argv: Sequence[str]) -> int:
    """Runs the command and returns its exit code."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    action, *words = argv
    if action not in ACTIONS:
        raise UsageError(f"fp8 {action}: there are {', '.join(ACTIONS)}\n{USAGE}")
    parser = Parser(USAGE)
    parser.add_argument("--recipe")
    parser.add_argument("--json", action="store_true", dest="as_json")
    if action != "probe":
        parser.add_argument("model")
    if action == "probe":
        parser.add_argument("--steps", type=positive, default=200)
        parser.add_argument("--seeds", type=positive, default=3)
        parser.add_argument("--recipes", default="")
    elif action != "plan":
        parser.add_argument("--rows", type=positive, default=16)
    if action == "inspect":
        parser.add_argument("--heatmap", type=Path)
    given, fields = parser.parse_known_args(words)
    recipes = [name.strip() for name in given.recipes.split(",") if name.strip()] if action == "probe" else []
    if recipe := given.recipe or next(iter(recipes), None):
        fields += ["--fp8.recipe", recipe]
    if action == "plan":
        fields += ["--data", os.devnull]
    if action != "probe":
        fields += ["--model", given.model]
    config = _config(fields)

    from rlhf.training.fp8 import command

    if action == "plan":
        return command.plan_command(given.model, config.fp8, given.as_json)
    if action == "inspect":
        return command.inspect_command(command.Rows(config, given.rows, given.as_json), given.heatmap)
    if action == "bisect":
        return command.bisect_command(command.Rows(config, given.rows, given.as_json))
    return command.probe_command(config, given.steps, given.seeds, recipes, given.as_json)


def _config(fields: Sequence[str]) -> SftConfig:
    """With recipe `block` where none is named. `output` is required of a stage; nothing is written there."""
    named = {word.partition("=")[0] for word in fields}
    fields = [*fields, *([] if "--output" in named else ["--output", os.devnull])]
    config = parse("sft", fields).config
    if config.fp8.recipe != "none":
        return config
    if "--fp8.recipe" in named:
        raise UsageError("--recipe none: without FP8 there is nothing to look at; leave it out for block")
    return parse("sft", [*fields, "--fp8.recipe", "block"]).config
