"""`rlhf runs list|show|rm`: which runs there are, what one was made from, and away with one."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

from rlhf.commands import show
from rlhf.config.arguments import Parser
from rlhf.errors import UsageError

USAGE = """\
rlhf runs list [DIR] [--stage NAME] [--state NAME] [--json]
rlhf runs show RUN [--json]
rlhf runs rm RUN [--force]

  list   every run under DIR (default: runs), oldest first: stage, state (running, killed, done, failed, preempted), start,
         duration and the figure that says most
  show   as `rlhf show`: what a run was made from and whether that is unchanged
  rm     deletes a run; refused while it is in progress, where another run beside it was made from it (--force does it all the
         same), and for a directory that is no run"""

STATES = ("running", "killed", "done", "failed", "preempted", "unknown")
PIPED_WIDTH = 10_000


def run(argv: list[str]) -> int:
    match argv:
        case ["list", *rest]:
            return _list(rest)
        case ["show", *rest]:
            return show.run(rest)
        case ["rm", *rest]:
            return _remove(rest)
        case [] | ["-h" | "--help", *_]:
            print(USAGE)
            return 0
        case [word, *_]:
            raise UsageError(f"{word}: expected list, show or rm\n{USAGE}")
    raise AssertionError("unreachable: every list of words is matched above")


def _list(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("directory", type=Path, nargs="?", default=Path("runs"))
    parser.add_argument("--stage")
    parser.add_argument("--state", choices=STATES)
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)

    from rlhf.runs.listing import runs_under

    found = [
        listed
        for listed in runs_under(given.directory)
        if given.stage in (None, listed.stage) and given.state in (None, listed.state)
    ]
    if given.as_json:
        print(json.dumps([asdict(listed) for listed in found], indent=2))
        return 0

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("run", "stage", "state", "started", "seconds", "result", box=None)
    for listed in found:
        result = ", ".join(f"{name} {value:.4g}" for name, value in listed.result.items())
        duration = f"{listed.seconds:.0f}" if listed.seconds is not None else ""
        started = listed.started[:16].replace("T", " ")
        table.add_row(*map(escape, (listed.run, listed.stage, listed.state, started, duration, result)))
    # a place that is cut short is of no use to who reads the output with a program
    width = None if sys.stdout.isatty() else PIPED_WIDTH
    Console(file=sys.stdout, highlight=False, width=width).print(
        table if found else f"no such run under {escape(str(given.directory))}"
    )
    return 0


def _remove(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("run", type=Path)
    parser.add_argument("--force", action="store_true")
    given = parser.parse_args(argv)

    from rlhf.runs.listing import remove

    remove(given.run, given.force)
    print(f"removed: {given.run}")
    return 0
