"""`rlhf show RUN`: how a run ended, what it reached, and the chain of what it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from rlhf.errors import DataError
from rlhf.runs.lineage import Node, chain
from rlhf.runs.manifest import MANIFEST, changed_files, is_run, read_manifest, read_status, seconds, standing

COLOURS = {"ok": "green", "changed": "red", "missing": "red", "by name": "dim"}


@dataclass(frozen=True)
class Description:
    run: str
    stage: str
    state: str
    reason: str
    seconds: float | None
    changed: list[str]
    result: dict[str, Any]
    inputs: tuple[Node, ...]


def describe_run(run: Path) -> Description:
    """Of a pipeline's directory, the run in it that was started last.

    Raises:
        DataError: there is no run.
    """
    if not (run / MANIFEST).is_file():
        runs = [file.parent for file in run.glob(f"*/{MANIFEST}") if is_run(file.parent)]
        if not runs:
            raise DataError(f"{run}: no run: there is no {MANIFEST} in it, nor in a directory in it")
        run = max(runs, key=lambda place: read_manifest(place)["started"])
    manifest, status = read_manifest(run), read_status(run)
    finished = manifest["finished"] is not None
    return Description(
        run=str(run),
        stage=manifest["stage"],
        state=standing(run, manifest),
        reason=status["reason"] if status and not finished else "",
        seconds=seconds(manifest) if finished else None,
        changed=changed_files(run, manifest),
        result=manifest["result"],
        inputs=chain(run),
    )


def print_run(described: Description, stream: IO[str]) -> None:
    """For a person: a line on the run, the tree of its inputs, its final figures."""
    from rich.console import Console
    from rich.markup import escape
    from rich.tree import Tree

    duration = f" in {described.seconds:.0f} s" if described.seconds is not None else ""
    reason = f": {described.reason}" if described.reason else ""
    console = Console(file=stream, highlight=False, soft_wrap=True)
    tree = Tree(f"[bold]{escape(described.run)}[/bold]  {described.stage}, {described.state}{duration}{escape(reason)}")
    for node in described.inputs:
        _grow(tree, node)
    console.print(tree)
    if described.changed:
        console.print(f"[red]changed since it finished:[/red] {escape(', '.join(described.changed))}")
    for name, value in described.result.items():
        for below, figure in value.items() if isinstance(value, dict) else [("", value)]:
            console.print(f"  {escape(f'{name} {below}'.rstrip())}: {escape(str(figure))}")


def _grow(tree: Any, node: Node) -> None:
    from rich.markup import escape

    stage = f"  {node.stage}" if node.stage else ""
    colour = COLOURS[node.verdict]
    branch = tree.add(f"{node.name}: {escape(node.path)}{stage}  [{colour}]{node.verdict}[/{colour}]")
    for below in node.inputs:
        _grow(branch, below)
