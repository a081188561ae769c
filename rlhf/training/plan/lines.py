"""A plan as a person reads it: tables by rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

VERDICT = {True: "fits", False: "does not fit", None: ""}


def show(plan: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True)
    for title, head, rows in sections(plan):
        if console.is_terminal:
            table = Table(*head, title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD)
            for row in rows:
                table.add_row(*row)
            console.print(table)
        else:
            widths = [max(len(row[column]) for row in (head, *rows)) for column in range(len(head))]
            print(title)
            for row in (head, *rows) if any(head) else rows:
                print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for line in sentences(plan):
        console.print(line, markup=False)


def sections(plan: dict[str, Any]) -> Iterator[tuple[str, Sequence[str], list[Sequence[str]]]]:
    """(title, head, rows) of each table."""
    machine, memory = plan["machine"], plan["memory"]
    where = f"{machine['processes']} x {machine['name']}, {plan['engine']}"
    parameters = plan["parameters"].items()
    yield (
        f"{plan['stage']} on {where}",
        ("role", "weights", "trained", "memory"),
        [(name, f"{one['all']:,}", f"{one['trained']:,}", size(one["bytes"])) for name, one in parameters],
    )
    rows: list[Sequence[str]] = [("always", name, size(bytes_)) for name, bytes_ in memory["state"].items()]
    for phase, parts in memory["phases"].items():
        rows += [(phase, name, size(bytes_)) for name, bytes_ in parts.items() if bytes_]
    highest = max(memory["phases"], key=lambda phase: sum(memory["phases"][phase].values()))
    rows.append(("peak", f"always, and {highest}", size(memory["peak"])))
    yield "memory of one process", ("when", "what", "bytes"), rows
    if len(plan["engines"]) > 1:
        yield (
            f"the same under each engine, {machine['processes']} processes",
            ("--launch", "peak", "on the host", ""),
            [
                (one["launch"], size(one["peak"]), size(one.get("host")), VERDICT[one["fits"]] if one["peak"] else one["why"])
                for one in plan["engines"]
            ],
        )
    if plan["counts"]:
        yield (
            "how many cards",
            ("cards", "engine", "peak of each", "", "time", "cost"),
            [
                (
                    str(one["processes"]),
                    one["engine"] if one["processes"] > 1 else "",
                    size(one["peak"]),
                    VERDICT[one["fits"]],
                    clock(one["seconds"]),
                    money(one["cost"]),
                )
                for one in plan["counts"]
            ],
        )


def sentences(plan: dict[str, Any]) -> Iterator[str]:
    machine, memory, run = plan["machine"], plan["memory"], plan["run"]
    yield from (f"batch     {line}" for line in plan["batches"])
    if memory["fits"] is not None:
        beyond = ", with the process itself and gaps of the heap" if machine["kind"] == "cpu" else ""
        yield (
            f"memory    {VERDICT[memory['fits']]}: needs {size(memory['taken'])}{beyond}, of {size(machine['room'])}; "
            + (
                f"micro_batch_size may be {memory['largest_micro_batch_size']}"
                if memory["largest_micro_batch_size"]
                else "not with micro_batch_size 1 either"
            )
        )
    if memory["host"]:
        yield f"host      {size(memory['host'])} of the host's memory for each process"
    if memory["fits"] is False:
        yield from (f"turn      {turn['flags']}  ({size(turn['peak'])})" for turn in plan["turn"])
        if not plan["turn"]:
            yield "turn      nothing that was tried makes it fit: more or larger cards, or a smaller model"
    if best := plan["recommended"]:
        under = f", with {best['engine']}" if best["processes"] > 1 else ""
        yield f"cards     {best['processes']} is the smallest number that fits{under}"
    flop = ", ".join(f"{name} {value:.3g}" for name, value in run["flop"].items())
    sampled = f", {run['generated']:,.0f} sampled" if run["generated"] else ""
    yield f"work      {run['steps']:,} steps, {run['tokens']:,.0f} tokens trained on{sampled}; FLOP: {flop}"
    if run["seconds"] is not None:
        parts = ", ".join(f"{name} {clock(value)}" for name, value in run["phases"].items())
        cost = f"; {money(run['cost'])} at the price given" if run["cost"] is not None else ""
        yield f"time      {clock(run['seconds'])} ({parts}){cost}"
    else:
        yield "time      not known: give --card, or --flops"
    yield from (f"assumed   {line}" for line in plan["assumptions"])
    if measured := plan.get("measured"):
        yield from (f"measured  {line}" for line in measured["lines"])


def size(value: float | None) -> str:
    """Decimal units, as GPUs and disks are sold in."""
    if not value:
        return ""
    return f"{value / 1e9:,.2f} GB" if value >= 1e9 else f"{value / 1e6:,.1f} MB"


def clock(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.2g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours:,} h {minutes:02} min" if hours else f"{minutes} min"


def money(cost: float | None) -> str:
    return "" if cost is None else f"{cost:,.2f}"
