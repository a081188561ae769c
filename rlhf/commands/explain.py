"""`rlhf explain`: a metric, a check or an exit code, in words."""

from __future__ import annotations

import json

from rlhf.config.arguments import Parser

USAGE = """\
rlhf explain [NAME] [--json]

  NAME is a key of metrics.jsonl (kl/sequence), a self-check ("first ratio") or an exit code (78): what it is, what it looks
  like when all is well, the likeliest causes when it does not, and what to do. Without NAME: all names."""


def run(argv: list[str]) -> int:
    parser = Parser(USAGE)
    parser.add_argument("name", nargs="*")
    parser.add_argument("--json", action="store_true", dest="as_json")
    given = parser.parse_args(argv)

    from rlhf.runs.explain import explanation, explanations

    if not given.name:
        names = {kind: list(entries) for kind, entries in explanations().items()}
        print(
            json.dumps(names, indent=2)
            if given.as_json
            else "\n".join(f"{kind}: {', '.join(of)}" for kind, of in names.items())
        )
        return 0
    entry = explanation(" ".join(given.name))
    if given.as_json:
        print(json.dumps(entry, indent=2))
        return 0
    print(f"{entry['name']}: {entry['what']}")
    if "healthy" in entry:
        print(f"  healthy   {entry['healthy']}")
    for number, cause in enumerate(entry.get("causes", ()), start=1):
        print(f"  {'likely' if number == 1 else '':9} {number}. {cause}")
    if "do" in entry:
        print(f"  do        {entry['do']}")
    return 0
