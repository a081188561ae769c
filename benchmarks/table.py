"""The tables of docs/performance.md from the JSON lines of the benchmarks, each with its machine, versions, date and commit.

    make bench | tee bench.jsonl
    python benchmarks/table.py bench.jsonl                          # prints them
    python benchmarks/table.py bench.jsonl --into docs/performance.md

`--into` replaces what stands between `<!-- NAME -->` and `<!-- /NAME -->` for each benchmark NAME that the file has lines of,
and draws performance-growth.png and performance-quality.png beside the page where it has theirs.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from _plots import draw_growth, draw_quality

Line = dict[str, Any]
PLOTS = {"growth": draw_growth, "quality": draw_quality}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--into", type=Path)
    asked = parser.parse_args()
    lines: dict[str, list[Line]] = {}
    for text in asked.file.read_text().splitlines():
        if text.startswith("{"):  # make says on standard output what it runs
            line = json.loads(text)
            lines.setdefault(line["benchmark"], []).append(line)
    blocks = {name: block(name, of_name) for name, of_name in lines.items()}
    if not asked.into:
        print("\n\n".join(blocks.values()))
        return
    page = asked.into.read_text()
    for name, text in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in page:
            print(f"{asked.into} has no place for {name}", file=sys.stderr)
            continue
        page = re.sub(f"{begin}.*?{end}", lambda _, text=text, a=begin, b=end: f"{a}\n{text}\n{b}", page, flags=re.S)
        if name in PLOTS:
            PLOTS[name](lines[name][-1], asked.into.with_name(f"performance-{name}.png"))
    asked.into.write_text(page)


def block(name: str, lines: Sequence[Line]) -> str:
    parts = [TABLES[name](lines)] if name in TABLES else [f"    {json.dumps(without_machine(line))}" for line in lines]
    return "\n\n".join([*parts, *dict.fromkeys(map(header, lines))])


def header(line: Line) -> str:
    """Machine, versions, date and commit."""
    machine = line.get("machine")
    if not isinstance(machine, dict):
        return ""
    versions = f"torch {machine['torch']}, transformers {machine['transformers']}"
    peer = line.get("peer_versions") or {}
    against = f"; TRL {peer['trl']} with transformers {peer['transformers']}" if "trl" in peer else ""
    place = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"Measured on {machine['date']} at commit {machine['commit']}: {place}; {versions}{against}."


def without_machine(line: Line) -> Line:
    return {name: value for name, value in line.items() if name not in ("machine", "peer_versions")}


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join("" if cell is None else str(cell) for cell in row) + " |" for row in lines)


def median(found: dict[str, float], digits: int = 1) -> str:
    """With its spread."""
    return f"{found['median']:.{digits}f} ({found['min']:.{digits}f}-{found['max']:.{digits}f})"


def setting(line: Line, names: Sequence[str]) -> str:
    flags = " ".join(line.get("flags", []))
    threads = "1 thread" if line["threads"] == 1 else f"{line['threads']} threads"
    return ", ".join([*(str(line[name]) for name in names), threads, *([f"`{flags}`"] if flags else [])])


def each_side(line: Line) -> Iterable[tuple[str, dict[str, Any]]]:
    for name, found in line["sides"].items():
        yield from ((name, one) for one in (found if isinstance(found, list) else [found]))


def rate_table(unit: str, names: Sequence[str], digits: int) -> Callable[[Sequence[Line]], str]:
    """A table of work per CPU second, in `unit`, of each side of lines that differ in the settings `names`."""
    columns = ["setting", "side", f"{unit} per CPU-s", "over TRL", f"{unit} per wall s", "micro-batch", "peak MiB", "of TRL's"]

    def rows(lines: Sequence[Line]) -> Iterable[list[Any]]:
        for line in lines:
            for name, found in each_side(line):
                over = found.get("over_trl", {}).get(unit)
                yield [
                    setting(line, names), name, median(found[f"{unit}_per_cpu_s"], digits), over,
                    median(found[f"{unit}_per_wall_s"], digits), found["micro_batch_size"], found["peak_mib"],
                    found.get("memory_over_trl"),
                ]  # fmt: skip

    return lambda lines: table(columns, rows(lines))


def ppo_table(lines: Sequence[Line]) -> str:
    phases = ["rollout", "score", "update"]
    rows = [
        [setting(line, ("shape", "lengths")), name, found["reply_length"], found.get("over_trl", {}).get("tokens"),
         median(found["cpu_s"], 2), *(median(found["phases_cpu_s"][phase], 2) if phase in found["phases_cpu_s"] else None
                                      for phase in phases)]
        for line in lines
        for name, found in each_side(line)
    ]  # fmt: skip
    columns = ["setting", "side", "reply length", "over TRL per token", "CPU-s an iteration", *phases]
    return rate_table("samples", ("shape", "lengths"), 2)(lines) + "\n\n" + table(columns, rows)


def memory_table(lines: Sequence[Line]) -> str:
    rows = [[name, peak] for name, peak in lines[-1]["peak_mib"].items()]
    ratios = ("adapters_over_separate", "separate_over_trl")
    rows += [[name.replace("_", " "), lines[-1][name]] for name in ratios if name in lines[-1]]
    return table(["run", "peak MiB"], rows)


def quality_table(lines: Sequence[Line]) -> str:
    columns = ["side", "CPU-s to the target, by seed", "median", "TRL's over it", "helpful at the end", "KL at the end"]
    rows = [
        [name, ", ".join(str(value or "never") for value in found["cpu_s_to_target"].values()),
         median(found["cpu_s"]) if "cpu_s" in found else None, found.get("trl_over_it"), median(found["helpful_at_end"], 2),
         median(found["kl_at_end"])]
        for name, found in each_side(lines[-1])
    ]  # fmt: skip
    return table(columns, rows)


def growth_table(lines: Sequence[Line]) -> str:
    rows = [
        [curve.replace("_", " "), point["at"], median(point["cpu_s_per_sample"], 3)]
        for curve, points in lines[-1]["curves"].items()
        for point in points
    ]
    return table(["what grows", "to", "CPU-s a sample"], rows)


def rollout_table(lines: Sequence[Line]) -> str:
    rows = [
        [f"{line['model']}, {name}", median(found["ours_tokens_per_cpu_s"], 0), median(found["generate_tokens_per_cpu_s"], 0),
         median(found["ratio"], 2), f"{found['alone']['differ']} of {found['alone']['rows']}" if "alone" in found else None]
        for line in lines
        for name, found in line.items()
        if isinstance(found, dict) and "ratio" in found
    ]  # fmt: skip
    return table(["setting", "ours", "generate", "ratio", "rows unlike one at a time"], rows)


def startup_table(lines: Sequence[Line]) -> str:
    ratios = {**lines[-1]["first_step_over_import"], **{
        f"launcher of {name}, with its stage": value for name, value in lines[-1]["with_launcher_over_import"].items()
    }}  # fmt: skip
    rows = [[name, median(found, 2), ratios.pop(name, None)] for name, found in lines[-1]["cpu_s"].items()]
    return table(["what", "CPU-s", "over import"], [*rows, *([name, None, value] for name, value in ratios.items())])


TABLES = {
    "ppo": ppo_table,
    "grpo": rate_table("samples", ("shape",), 2),
    "sft": rate_table("tokens", ("shape", "precision"), 0),
    "rm": rate_table("pairs", ("shape", "prompt", "reply"), 1),
    "memory": memory_table,
    "quality": quality_table,
    "growth": growth_table,
    "rollout": rollout_table,
    "startup": startup_table,
}


if __name__ == "__main__":
    main()
