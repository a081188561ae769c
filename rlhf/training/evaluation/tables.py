"""The result of `rlhf eval` as a person reads it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.training.evaluation.rows import REWARD_MODEL
from rlhf.training.reading import FEW

SLICES_SHOWN = 30
"""Lines; --json and --output have all."""


def table(result: dict[str, Any]) -> Iterable[str]:
    return _of_prompts(result) if "wins" in result else _of_rows(result)


def _of_prompts(result: dict[str, Any]) -> Iterable[str]:
    few = "; few prompts: says little" if result["prompts"] < FEW else ""
    how = f"temperature {result['temperature']:g}, seed {result['seed']}"
    yield f"{result['model']}: a policy on {result['prompts']} prompts of {result['data']}, {how} (95% intervals){few}"
    columns, names = result["figures"], dict.fromkeys(name for column in result["figures"].values() for name in column)
    if "against" in result:
        yield " " * 20 + "".join(f"{who:>32}" for who in columns) + f"   ({result['against']})"
    for name in names:
        cells = (_interval(column[name]) if name in column else "" for column in columns.values())
        yield f"{name:20}" + "".join(f"{cell:>32}" for cell in cells)
    if result["without_score"]:
        several = any(name.startswith("reward/") for name in names)
        means = " from one source or more: they are not in the mean `reward`" if several else ": they are in no mean of rewards"
        yield f"{result['without_score']} replies have no score{means}, and not compared by it"
    for who, row in result["wins"].items():
        interval = "{win_rate:.3f} (95%: {win_rate_low:.3f} to {win_rate_high:.3f})".format(**row)
        counts = "{wins} wins, {ties} ties, {losses} losses".format(**row)
        yield f"by the {who} its reply is better in {interval}: {counts}, a tie half"
        if "first" in row:
            said = (
                "{agreed} of {asked} pairs judged alike in both orders; {first:.3f} of its answers were for the first".format(
                    **row
                )
            )
            yield f"  {said}"


def _interval(figure: dict[str, float | None]) -> str:
    ends = "" if figure["low"] is None else f" ({figure['low']:.4g} to {figure['high']:.4g})"
    return f"{figure['mean']:.4g}{ends}"


def _of_rows(result: dict[str, Any]) -> Iterable[str]:
    columns = {**result["figures"], **({"difference": result["difference"]} if "difference" in result else {})}
    counts = ", ".join(f"{value:,} {name}" for name, value in result.items() if isinstance(value, int))
    yield f"{result['model']}: a {result['kind']}, {counts} of {result['data']}"
    yield " " * 20 + "".join(f"{name:>14}" for name in columns)
    for name in next(iter(result["figures"].values())):
        cells = (
            f"{column[name]:>+14.6f}" if title == "difference" else f"{column[name]:>14.6f}"
            for title, column in columns.items()
        )
        yield f"{name:20}" + "".join(cells)
    if "longer_wins" in result:
        yield f"taking the longer reply is right in {result['longer_wins']:.3f}"
    for precision, bins in result.get("reliability", {}).items():
        yield f"{precision}: how sure it is, and how often it is right"
        for sure, row in bins.items():
            yield f"  {sure}: says {row['predicted']:.3f}, right in {row['observed']:.3f} of {row['prompts']:.6g}"
    for precision, found in result.get("slices", {}).items():
        yield f"{precision}: accuracy by slice (95% interval, prompts)"
        yield from _of_slices(found)
    if "drift" in result:
        unit = "score of a reply" if result["kind"] == REWARD_MODEL else "log-probability of a token"
        yield f"FP8 moves the {unit} by {result['drift']['mean']:.2e} in the mean, {result['drift']['max']:.2e} at most"
    if "forgetting" in result:
        yield from _of_forgetting(result["forgetting"])


def _of_slices(found: dict[str, dict[str, float]]) -> Iterable[str]:
    width = max(map(len, found), default=0)
    for name, row in list(found.items())[:SLICES_SHOWN]:
        few = "  few: says little" if row["prompts"] < FEW else ""
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        yield f"  {name:{width}}  {row['accuracy']:.3f}  ({interval}, {row['prompts']:.6g}){few}"
    if len(found) > SLICES_SHOWN:
        yield f"  and {len(found) - SLICES_SHOWN} more, in --json"


def _of_forgetting(found: dict[str, Any]) -> Iterable[str]:
    few = "; few rows: says little" if found["rows"] < FEW else ""
    yield f"beside its base {found['base']}, on the same {found['rows']} rows{few}"
    interval = f"95%: {found['lost_low']:+.4f} to {found['lost_high']:+.4f}"
    yield f"  {found['of']} {found['before']:.4f} before, {found['after']:.4f} after: lost {found['lost']:+.4f} ({interval})"
    if "perplexity_ratio" in found:
        ratio, low, high = (found[f"perplexity_ratio{end}"] for end in ("", "_low", "_high"))
        before, after = found["perplexity_before"], found["perplexity_after"]
        yield f"  perplexity {before:.3f} before, {after:.3f} after: times {ratio:.3f} (95%: {low:.3f} to {high:.3f})"
    yield f"  {found['verdict']}"
