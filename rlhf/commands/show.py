"""`rlhf show`: what a run was made from."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rlhf.config.arguments import Parser

USAGE = "rlhf show RUN [--json]"


def run(argv: list[str]) -> int:
    from rlhf.runs.show import describe_run, print_run

    parser = Parser(USAGE)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", action="store_true", dest="as_json")
    arguments = parser.parse_args(argv)
    described = describe_run(arguments.run)
    if arguments.as_json:
        print(json.dumps(asdict(described), indent=2))
    else:
        print_run(described, sys.stdout)
    return 0
