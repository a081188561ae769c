"""What a metric, a self-check, an alarm or an exit code is, what is healthy, and what to do otherwise. Tables are beside."""

from __future__ import annotations

from difflib import get_close_matches
from fnmatch import fnmatchcase

from rlhf.errors import UsageError
from rlhf.runs.explain.alarms import ALARMS
from rlhf.runs.explain.checks import CHECKS
from rlhf.runs.explain.entry import Entry
from rlhf.runs.explain.exit_codes import EXIT_CODES
from rlhf.runs.explain.learning_metrics import LEARNING_METRICS
from rlhf.runs.explain.policy_metrics import POLICY_METRICS

ENTRIES = (*POLICY_METRICS, *LEARNING_METRICS, *CHECKS, *ALARMS, *EXIT_CODES)
BY_NAME = {entry.name: entry for entry in ENTRIES}
ALIASES = {
    "eval/kl": "kl/sequence",
    "eval/length": "rollout/length",
    "eval/ended": "rollout/ended",
}
"""Metrics that are read as another one is."""
FORMS = [entry for entry in ENTRIES if "*" in entry.name]
"""In the order in which they are tried."""


MISSPELT = 0.85
"""How like a known name, by difflib's ratio, another one is no name of the user's own but a mistake."""


def found(name: str) -> Entry | None:
    """The row of a name: its own; of `eval/NAME`, that of NAME; or that of the first form it has."""
    if own := BY_NAME.get(ALIASES.get(name, name)) or BY_NAME.get(name.removeprefix("eval/")):
        return own
    of_rows = [name.removeprefix("eval/"), name]
    return next((entry for asked in of_rows for entry in FORMS if fnmatchcase(asked, entry.name)), None)


def explained(name: str) -> Entry:
    """As `found`, whatever the case, and without the prefix where only one metric ends so.

    Raises:
        UsageError: there is none; the nearest names are told.
    """
    names = {known.lower(): known for known in (*BY_NAME, *ALIASES)}
    asked = names.get(name.lower(), name.lower())
    entry = found(asked)
    if entry and "*" in entry.name and (close := get_close_matches(asked, names, n=1, cutoff=MISSPELT)):
        raise UsageError(
            f"nothing is called {name!r}; did you mean {names[close[0]]}? What has a name of your own: {entry.name}"
        )
    if entry:
        return entry
    ending = [known for known in BY_NAME if known.endswith(f"/{asked}")]
    if len(ending) == 1:
        return BY_NAME[ending[0]]
    near = ending or [names[close] for close in get_close_matches(name.lower(), names, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "`rlhf explain` lists all names"
    raise UsageError(f"nothing is called {name!r}; {hint}")


def why_and_what(entry: Entry) -> list[str]:
    """What it means out of its range, the likeliest causes in order, and what to do; a line each."""
    causes = "; ".join(f"{number}. {cause}" for number, cause in enumerate(entry.causes, start=1))
    return [f"it means: {entry.otherwise}", f"likeliest causes: {causes}", f"what to do: {entry.do}"]
