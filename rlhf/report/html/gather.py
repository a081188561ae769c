"""What the page shows, read from a run's files; a run that ended early lacks some of them, and the page says less."""

from __future__ import annotations

import base64
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.schema import STAGES
from rlhf.errors import DataError, without_secrets
from rlhf.report.alarms import in_words
from rlhf.report.html import charts
from rlhf.report.html.panels import NOT_DRAWN, PANELS
from rlhf.report.html.verdict import Finding, Level, ending, findings, kl_budget, series, warned, worst
from rlhf.report.records import NOTES, Records
from rlhf.runs.lineage import Node, chain
from rlhf.runs.manifest import (
    MANIFEST,
    STATUS,
    changed_files,
    has_status,
    is_run,
    read_manifest,
    read_status,
    seconds,
    standing,
)

MOST_PROMPTS = 20
PICTURE_BYTES = 4 << 20


@dataclass(frozen=True)
class Sampled:
    """The replies to one prompt, in the order of steps: (step, reply, its scores; None where a source gave none)."""

    prompt: str
    replies: list[tuple[int, str, dict[str, float | None]]]


@dataclass(frozen=True)
class RunPage:
    run: str
    stage: str
    state: str
    level: Level
    findings: list[Finding]
    facts: dict[str, str]
    rows: list[tuple[str, str, str]]
    """Name, before, after; before is empty where there is one figure."""
    charts: list[charts.Chart]
    others: list[charts.Chart]
    samples: list[Sampled]
    prompts: int
    phases: list[tuple[str, float, float]]
    """Name, seconds, share."""
    lineage: tuple[Node, ...]
    notes: list[tuple[int, str]]
    """Steps done, and what was said."""
    pictures: list[tuple[str, str]]
    command: str

    @property
    def headline(self) -> str:
        """The first of the findings that weigh most, how it ended aside, and how many more there are."""
        heaviest = [finding.text for finding in self.findings[1:] if finding.level == self.level]
        more = f" And {len(heaviest) - 1} more, below." if len(heaviest) > 1 else ""
        return (heaviest or [self.findings[0].text])[0] + more


def find_runs(place: Path) -> list[Path]:
    """The run itself, or the runs of a pipeline's directory in the order in which they started.

    Raises:
        DataError: there is none.
    """
    if (place / MANIFEST).is_file() or (place / STATUS).is_file():
        return [place]
    started = {file.parent: read_manifest(file.parent) for file in place.glob(f"*/{MANIFEST}") if is_run(file.parent)}
    runs = {run: manifest["started"] for run, manifest in started.items() if manifest["stage"] in STAGES}
    # a stage that failed before there was anything to record: without it the page of its pipeline would be all green
    for file in place.glob(f"*/{STATUS}"):
        if file.parent not in started and has_status(file.parent) and (status := read_status(file.parent)):
            runs[file.parent] = status["time"]
    if not runs:
        raise DataError(f"{place}: no run: there is no {MANIFEST} in it, nor in a directory in it")
    return sorted(runs, key=lambda run: runs[run])


def gather(run: Path) -> RunPage:
    manifest = read_manifest(run) if (run / MANIFEST).is_file() else {}
    status = read_status(run) or {}
    stage = manifest.get("stage", run.resolve().name)  # of a pipeline, a directory is called as its stage
    config, result = manifest.get("config", {}), manifest.get("result", {})
    finished = manifest.get("finished") is not None
    state = standing(run, manifest)
    metrics = Records(run / "metrics.jsonl").read()
    samples = _samples(Records(run / "samples.jsonl").read())
    lineage = chain(run) if manifest else ()
    found = [ending(state, status.get("reason", "") if not finished else ""), *findings(stage, config, result, metrics)]
    notes = [(line["step"], str(line.get("text", ""))) for line in Records(run / NOTES).read()]
    found += [*_warnings(run, manifest, lineage, metrics), *warned(notes)]
    drawn, others = _curves(config, metrics)
    return RunPage(
        run=str(run),
        stage=stage,
        state=state,
        level=worst(found),
        findings=found,
        facts=_facts(manifest, metrics),
        rows=_rows(result),
        charts=[*drawn, *_distributions(run, result, samples)],
        others=others,
        samples=samples[:MOST_PROMPTS],
        prompts=len(samples),
        phases=_phases(metrics),
        lineage=lineage,
        notes=notes,
        pictures=_pictures(run),
        command=_command(manifest),
    )


def _warnings(run: Path, manifest: dict[str, Any], lineage: tuple[Node, ...], metrics: list[dict[str, Any]]) -> list[Finding]:
    found = []
    if not metrics:
        found.append(Finding("warn", "No step was recorded, so there are no curves."))
    if manifest.get("stage") in ("ppo", "grpo") and metrics and not (run / "samples.jsonl").is_file():
        found.append(
            Finding("warn", "No reply was kept: with data.eval the same prompts are answered over time. Read replies.")
        )
    if manifest and (changed := changed_files(run, manifest)):
        found.append(Finding("bad", f"Changed since the run finished: {', '.join(changed)}"))
    for node in lineage:
        if node.verdict in ("changed", "missing"):
            found.append(Finding("warn", f"Its {node.name}, {node.path}, is {node.verdict} since."))
    found += [Finding("warn", words) for words in in_words(Records(run / "alarms.jsonl").read())]
    if (run / "non_finite").is_dir():
        found.append(Finding("warn", f"NaN or infinity was met; the rows are in {run / 'non_finite'}."))
    return found


def _curves(config: dict[str, Any], metrics: list[dict[str, Any]]) -> tuple[list[charts.Chart], list[charts.Chart]]:
    def points(name: str) -> charts.Points:
        return [(record["step"], record[name]) for record in metrics if isinstance(record.get(name), int | float)]

    drawn, left = [], {name: None for record in metrics for name in record}
    for title, names, note in PANELS:
        limit = kl_budget(config) if "kl/sequence" in names else None
        drawn.append(charts.curves(title, note, {name: points(name) for name in names}, limit))
        left = {name: None for name in left if name not in names}
    rest = [name for name in left if name not in NOT_DRAWN and not name.startswith("time/")]
    others = [charts.curves(name, "", {name: points(name)}) for name in rest]
    return [chart for chart in drawn if chart], [chart for chart in others if chart]


def _distributions(run: Path, result: dict[str, Any], samples: list[Sampled]) -> list[charts.Chart]:
    bins = result.get("eval/reliability", {}).values()
    found = [charts.calibration([(row["predicted"], row["observed"]) for row in bins])]
    steps = sorted({step for sampled in samples for step, *_ in sampled.replies})
    scores: dict[str, list[float]] = {
        f"step {step}": [
            score
            for sampled in samples
            for at, _, told in sampled.replies
            if at == step and (score := told.get("score")) is not None
        ]
        for step in dict.fromkeys(steps[:1] + steps[-1:])
    }
    for title, counted in (("Scores of the sampled replies", scores), ("Scores of the rollouts", _recorded(run))):
        count = sum(map(len, counted.values()))
        found.append(charts.histogram(title, f"{count} replies, counted by score", counted))
    return [chart for chart in found if chart]


def _recorded(run: Path) -> dict[str, list[float]]:
    """Scores of the first and of the last rollouts, where the run kept them (`--record`)."""
    from safetensors import safe_open

    def step(file: Path) -> int:
        return int(file.stem.removeprefix("step-"))

    files = sorted((run / "rollouts").glob("step-*.safetensors"), key=step)
    found = {}
    for file in dict.fromkeys(files[:1] + files[-1:]):
        with safe_open(file, framework="numpy") as tensors:
            found[f"step {step(file)}"] = tensors.get_tensor("scores").tolist()
    return found


def _samples(records: list[dict[str, Any]]) -> list[Sampled]:
    by_prompt: dict[str, list[tuple[int, str, dict[str, float | None]]]] = {}
    for record in sorted(records, key=lambda record: record["step"]):
        told = (record["step"], record["response"], record.get("scores", {}))
        by_prompt.setdefault(record["prompt"], []).append(told)
    return [Sampled(prompt, replies) for prompt, replies in by_prompt.items()]


def _rows(result: dict[str, Any]) -> list[tuple[str, str, str]]:
    before, after = result.get("before", {}), result.get("after", {})
    rows = [(name, _figure(before.get(name)), _figure(after.get(name))) for name in before | after]
    single = {name: value for name, value in result.items() if not isinstance(value, dict)}
    return rows + [(name, "", _figure(value)) for name, value in single.items()]


def _figure(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _phases(metrics: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    names = {name: None for record in metrics for name in record if name.startswith("time/") and name != "time/step_s"}
    spent = {name.removeprefix("time/").removesuffix("_s"): sum(series(metrics, name)) for name in names}
    total = max(sum(series(metrics, "time/step_s")), sum(spent.values()))
    if total <= 0:
        return []
    spent["everything else" if spent else "steps"] = total - sum(spent.values())
    return [(name, taken, taken / total) for name, taken in spent.items() if taken > 0]


def _facts(manifest: dict[str, Any], metrics: list[dict[str, Any]]) -> dict[str, str]:
    finished = manifest.get("finished")
    facts = {
        "steps": str(max((record["step"] for record in metrics), default=0)),
        "started": str(manifest.get("started", ""))[:19].replace("T", " "),
        "took": f"{seconds(manifest):.0f} s" if finished else "",
        "seed": str(manifest.get("seed", "")),
        "device": f"{manifest.get('device', '')}, {manifest.get('engine', '')}".strip(", "),
        "rlhf": str(manifest.get("rlhf_version", "")),
        "torch": str(manifest.get("versions", {}).get("torch", "")),
    }
    return {name: value for name, value in facts.items() if value}


def _pictures(run: Path) -> list[tuple[str, str]]:
    files = [file for file in sorted([*run.glob("*.png"), *run.glob("fp8*/**/*.png")]) if file.stat().st_size <= PICTURE_BYTES]
    return [(str(file.relative_to(run)), base64.b64encode(file.read_bytes()).decode()) for file in files]


def _command(manifest: dict[str, Any]) -> str:
    """As it was given, a flag a line; a recipe of ours by its word, a copy of it as the Python file that it is."""
    words = [str(word) for word in manifest.get("command", [])]
    if not words:
        return ""
    stage, script, processes = manifest["stage"], Path(words[0]), manifest.get("world_size", 1)
    if script.name == f"{stage}.py" and script.parent.name in ("stages", "_stages"):
        first, launch = ["rlhf", stage], shlex.split(manifest.get("launch", ""))
    else:
        first = ["accelerate", "launch", f"--num_processes={processes}", words[0]] if processes > 1 else ["python", words[0]]
        launch = []
    lines: list[list[str]] = [first]
    for word in (*words[1:], *launch):
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return without_secrets(" \\\n  ".join(map(shlex.join, lines)))
