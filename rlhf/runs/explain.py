"""What a metric, a self-check or an exit code means; the knowledge is explanations.yaml."""

from __future__ import annotations

from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from rlhf.errors import UsageError

FILE = Path(__file__).with_name("explanations.yaml")


@cache
def explanations() -> dict[str, dict[str, dict[str, Any]]]:
    """By kind (metrics, checks, exit codes) and name."""
    return yaml.safe_load(FILE.read_text(encoding="utf-8"))


def explanation(name: str) -> dict[str, Any]:
    """Of one name, in whichever kind; `eval/reward` also as what it is of: `reward`.

    Raises UsageError, with the nearest names, where there is none.
    """
    known = {
        known: {"name": known, "kind": kind, **entry}
        for kind, entries in explanations().items()
        for known, entry in entries.items()
    }
    if name in known:
        return known[name]
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise UsageError(f"nothing is known of {name!r}{hint} (`rlhf explain` lists all names)")


def advice(check: str) -> list[str]:
    """Of a self-check that failed: likeliest causes in order, and what to do; nothing where nothing is known."""
    entry = explanations()["checks"].get(check, {})
    causes = [f"likely: {'; or '.join(entry['causes'])}"] if entry.get("causes") else []
    return causes + ([f"do: {entry['do']}"] if entry.get("do") else [])
