"""`rlhf path`: where a stage's recipe is."""

from __future__ import annotations

from pathlib import Path

from rlhf import paths
from rlhf.commands import STAGES
from rlhf.config.arguments import Parser
from rlhf.errors import DataError

USAGE = "rlhf path STAGE"


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("stage", choices=STAGES)
    print(recipe_of(parser.parse_args(argv).stage))
    return 0


def recipe_of(stage: str) -> Path:
    recipe = paths.STAGES / f"{stage}.py"
    if not recipe.is_file():
        raise DataError(f"{recipe}: missing; this installation of rlhf is broken, install it again")
    return recipe
