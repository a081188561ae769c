"""`rlhf explain`: a metric, a self-check, an alarm or an exit code in plain words."""

from __future__ import annotations

import json
from dataclasses import asdict

from rlhf.config.arguments import Parser

USAGE = """\
rlhf explain [NAME] [--json]

  NAME   a metric of metrics.jsonl (kl/sequence, or sequence where only one ends so), a self-check (first ratio), an alarm
         (KL budget) or an exit code (71). Without it, every name there is.

  What it is and in which unit, what is healthy, what it means where it is not, the three likeliest causes in order, and what
  to do. A NAME with * in the list stands for all of that form: reward/* for the sources of a combined reward."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)

    from rlhf.runs.explain import ENTRIES, explained, why_and_what

    name = " ".join(given.words)
    if not name:
        if given.as_json:
            print(json.dumps([asdict(entry) for entry in ENTRIES], indent=2))
            return 0
        kinds = {entry.kind: None for entry in ENTRIES}
        for kind in kinds:
            print(f"{kind}s")
            for entry in ENTRIES:
                if entry.kind == kind:
                    print(f"  {entry.name:27} {entry.what}")
        return 0
    entry = explained(name)
    if given.as_json:
        print(json.dumps({"asked": name} | asdict(entry), indent=2))
        return 0
    about = entry.name if entry.name == name else f"{name} (as {entry.name})"
    print("\n".join([f"{about}, a{'n' if entry.kind[0] in 'ae' else ''} {entry.kind}", f"it is: {entry.what}"]))
    print("\n".join([f"healthy: {entry.healthy}", *why_and_what(entry)]))
    return 0
