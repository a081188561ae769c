"""`rlhf copy`: a copy of a stage's recipe, to edit."""

from __future__ import annotations

import shutil
from pathlib import Path

from rlhf.commands import STAGES
from rlhf.commands.path import recipe_of
from rlhf.config.arguments import Parser
from rlhf.errors import OutputError

USAGE = "rlhf copy STAGE [DEST]"


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("destination", type=Path, nargs="?")
    arguments = parser.parse_args(argv)
    recipe = recipe_of(arguments.stage)
    target = arguments.destination or Path(recipe.name)
    target = target / recipe.name if target.is_dir() else target
    if target.exists():
        raise OutputError(f"{target}: is there already; name another: rlhf copy {arguments.stage} my_{recipe.name}")
    if not target.parent.is_dir():
        raise OutputError(f"{target}: there is no directory {target.parent}")
    shutil.copyfile(recipe, target)
    print(f"{target}\nrun it with: python {target} --config {arguments.stage} ...")
    return 0
