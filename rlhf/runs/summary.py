"""What a pipeline achieved: read from the files its stages left, as data and as a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Any

from rlhf.runs.manifest import MANIFEST, read_json, seconds

# Shown as a percentage: shares of replies. All else is a plain number.
SHARES = ("helpful", "polite", "correct", "grammatical", "rude", "ended")

ACCURATE = {"rm": "reward_model", "dpo": "dpo", "kto": "kto"}
"""Stages that are measured by how often they are right about held-out rows, and what they are called in a summary."""


ASIDE = ("kl", "score_standard_error")
"""What the table has a row of its own for, or is for the report."""


def summary(output: Path) -> dict[str, Any]:
    """The figures of a pipeline's output directory; parts of stages it does not have are left out or empty.

    Returns:
        {"output", "policy": "ppo" or "grpo", "before", "after": metric -> value over the held-out prompts, of the policy it
        started from and of its result; "reward_model", "dpo", "kto": {"accuracy", "low", "high"}, the 95% interval; "kl": nats
        per reply from the SFT policy; "seconds": stage -> wall time; "samples": [{"prompt", "before", "after"}]}
    """
    manifests = {file.parent.name: read_json(file) for file in sorted(output.glob(f"*/{MANIFEST}"))}
    finished = {name: manifest for name, manifest in manifests.items() if manifest["finished"]}
    results = {name: manifest["result"] for name, manifest in finished.items()}
    figures: dict[str, Any] = {"output": str(output)}
    policy = next((stage for stage in ("ppo", "grpo") if stage in results), None)
    if policy is not None:
        before, after = (results[policy].get(name, {}) for name in ("before", "after"))  # empty without held-out prompts
        figures |= {"policy": policy, "before": before, "after": after, "kl": after.get("kl")}
    for stage, of in ACCURATE.items():
        if "eval/accuracy" in results.get(stage, {}):
            names = {"accuracy": "eval/accuracy", "low": "eval/accuracy_low", "high": "eval/accuracy_high"}
            figures[of] = {name: results[stage].get(key) for name, key in names.items()}
    in_order = sorted(finished, key=lambda name: finished[name]["started"])
    figures["seconds"] = {name: seconds(finished[name]) for name in in_order}
    return figures | {"samples": samples(output / (policy or "ppo") / "samples.jsonl")}


def samples(file: Path) -> list[dict[str, str]]:
    """The first and the last reply to each prompt of a samples.jsonl."""
    if not file.is_file():
        return []
    with file.open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    by_step = sorted(rows, key=lambda row: row["step"])
    first = {row["prompt"]: row["response"] for row in reversed(by_step)}
    last = {row["prompt"]: row["response"] for row in by_step}
    prompts = dict.fromkeys(row["prompt"] for row in by_step)
    return [{"prompt": prompt, "before": first[prompt], "after": last[prompt]} for prompt in prompts]


def show(figures: dict[str, Any], stream: IO[str]) -> None:
    """Print samples and figures for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(file=stream, highlight=False)
    for sample in figures["samples"]:
        console.print(f"\n[bold]{_plain(sample['prompt'])}[/bold]")
        console.print(f"  SFT  {_plain(sample['before'])}")
        console.print(f"  {figures.get('policy', 'ppo').upper():4} {_plain(sample['after'])}")
    table = Table(title=f"\n{figures['output']}", title_justify="left")
    table.add_column("")
    table.add_column("SFT", justify="right")
    table.add_column(figures.get("policy", "ppo").upper(), justify="right")
    before, after = figures.get("before", {}), figures.get("after", {})
    for name in before | after:
        if name not in ASIDE:
            table.add_row(name, _number(name, before.get(name)), _number(name, after.get(name)))
    if figures.get("kl") is not None:
        table.add_row("KL from SFT, nats per reply", "", f"{figures['kl']:.2f}")
    for of in ACCURATE.values():
        if found := figures.get(of):
            name = f"{of.replace('_', ' ')}, held-out accuracy"
            table.add_row(name, "", "{accuracy:.3f} [{low:.3f}, {high:.3f}]".format(**found))
    for stage, duration in figures["seconds"].items():
        table.add_row(f"seconds for {stage}", "", f"{duration:.0f}")
    console.print(table)


def _number(name: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0%}" if name.split("/")[-1] in SHARES else f"{value:.2f}"


def _plain(text: str) -> str:
    """Replies are text, not console markup."""
    from rich.markup import escape

    return escape(text)
