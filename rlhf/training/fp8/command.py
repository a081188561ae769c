"""What `rlhf fp8 plan|inspect|probe|bisect` prints."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

from rlhf.config.schema import SftConfig
from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError, DataError, OutputError, UsageError
from rlhf.fp8.plan import plan, require_any, require_matches, summary
from rlhf.fp8.recipes import OPERANDS, SHAPES, recipe_of
from rlhf.fp8.state import calibrating, delayed_layers
from rlhf.models.outline import outline
from rlhf.report import heatmap
from rlhf.report.console import Console
from rlhf.training.fp8.bisect import bisect, keep_patterns
from rlhf.training.fp8.inspection import SQNR_LIMITS, Finding, inspect
from rlhf.training.fp8.probe import Verdict, probe
from rlhf.training.fp8.sft import Subject, open_subject, read_rows, with_fp8

RECIPES = tuple(name for name in get_args(Fp8.model_fields["recipe"].annotation) if name != "none")
SHOWN = 10
"""Findings in the table; --json has all."""


@dataclass(frozen=True)
class Rows:
    """What inspect and bisect look at: `count` rows of the data."""

    config: SftConfig
    count: int
    as_json: bool


def plan_command(model: str, fp8: Fp8, as_json: bool) -> int:
    laid_out = outline(model)
    decisions = plan(laid_out, fp8)
    require_matches(decisions, fp8, laid_out)
    if as_json:
        rows = [asdict(one) | {"high_precision": sorted(one.high_precision), "in_fp8": one.in_fp8} for one in decisions]
        _print_json({"recipe": fp8.recipe, "layers": rows})
    else:
        rows = [(one.name, f"{one.shape[0]} x {one.shape[1]}", "FP8" if one.in_fp8 else "-", one.reason) for one in decisions]
        print(_table(("layer", "out x in", fp8.recipe, "why"), rows))
        print(f"\n{summary(decisions)}")
    require_any(decisions, fp8, laid_out)
    return 0


def inspect_command(asked: Rows, picture: Path | None) -> int:
    if picture is not None and (picture.is_dir() or not picture.absolute().parent.is_dir()):
        raise OutputError(f"--heatmap {picture}: expected a file to write, in a directory that is there")
    config = _on_reference(asked.config)
    subject = open_subject(config)
    rows = read_rows(subject, config.data.train)
    looked_at, before = subject.batches(rows[: asked.count]), subject.batches(rows[asked.count : 2 * asked.count])
    if recipe_of(config.fp8).delayed:
        _require_rows_before(before)
    others = [recipe_of(config.fp8.model_copy(update={"recipe": name})) for name in SHAPES]

    def run(batches: list) -> None:
        for batch in batches:
            subject.loss([batch])
            subject.gradients()

    found = inspect(subject.roles.actor, recipe_of(config.fp8), others, lambda: run(looked_at), lambda: run(before))
    if picture is not None:
        cells: dict[str, dict[str, float]] = {}
        for one in sorted(found, key=lambda one: _numbers_apart(one.layer)):
            cells.setdefault(one.layer, {})[one.operand] = one.sqnr_db
        low, high = SQNR_LIMITS["E5M2"][1], SQNR_LIMITS["E4M3"][0] + 4
        heatmap.draw(picture, cells, OPERANDS, f"SQNR in dB, recipe {config.fp8.recipe}", low, high)
    if asked.as_json:
        _print_json({"recipe": config.fp8.recipe, "operands": [asdict(one) for one in found]})
        return 0
    print(_table(("", "layer", "operand", "amax", "scale", "underflow", "overflow", "SQNR dB", "cosine",
                  *(f"{name}?" for name in SHAPES)), map(_row, found[:SHOWN])))  # fmt: skip
    counts = {level: sum(one.level == level for one in found) for level in ("error", "warn", "ok")}
    print(f"\n{len(found)} operands under {config.fp8.recipe}: {counts['error']} errors, {counts['warn']} warnings, "
          f"{counts['ok']} as they should be; the worst {min(SHOWN, len(found))} are shown. "
          "The last columns: SQNR under the other recipes")  # fmt: skip
    return 0


def bisect_command(asked: Rows) -> int:
    config = _on_reference(asked.config)
    subject = open_subject(config)
    rows = read_rows(subject, config.data.train)
    batches = subject.batches(rows[: asked.count])
    _calibrate(subject, subject.batches(rows[asked.count : 2 * asked.count]))
    console = Console("fp8 bisect", speak=True)
    found = bisect(subject, batches, lambda done, total: console.step(done, done / total, 0, {}))
    console.close()
    patterns = keep_patterns(found)
    if asked.as_json:
        _print_json({"recipe": config.fp8.recipe, "keep": patterns, "products": [asdict(one) for one in found]})
        return 0
    what = {"fprop": "mean |log-prob error|", "dgrad": "relative gradient error", "wgrad": "relative gradient error"}
    rows_shown = [
        (one.gemm, what[one.gemm], f"{one.error:.2e}", f"{one.left:.2e}", ", ".join(one.keep) or "nothing stands out")
        for one in found
    ]
    print(_table(("product", "error", "all in FP8", "with the list", "list"), rows_shown))
    print(f"\n--fp8.keep {','.join(patterns)}" if patterns else "\nnothing stands out: no few layers carry the error")
    return 0


def probe_command(config: SftConfig, steps: int, seeds: int, recipes: Sequence[str], as_json: bool) -> int:
    unknown = [name for name in recipes if name not in RECIPES]
    if unknown:
        raise UsageError(f"--recipes: given {unknown[0]!r}, expected some of {', '.join(RECIPES)}, separated by commas")
    recipes = recipes or [config.fp8.recipe]
    console, total, done = Console("fp8 probe", speak=True), (len(recipes) + 1) * seeds * steps, 0

    def report(run: str, step: int, loss: float) -> None:
        nonlocal done
        done += 1
        if step == 0:
            console.note(run)
        console.step(done, done / total, 0, {"loss": loss})

    verdicts = probe(config, steps, seeds, recipes, report)
    console.close()
    if as_json:
        _print_json({"steps": steps, "seeds": seeds, "recipes": [asdict(one) for one in verdicts]})
    else:
        print(_table(("recipe", "loss gap", "bound", "seed band", "gradient cosine", "log-prob drift", "largest", "ratio drift",
                      "verdict"), map(_verdict_row, verdicts)))  # fmt: skip
    return 0 if all(one.within for one in verdicts) else 1


def _on_reference(config: SftConfig) -> SftConfig:
    """Operands are seen in the reference's layers only."""
    if config.fp8.backend not in ("auto", "reference"):
        raise ConfigError(f"fp8.backend {config.fp8.backend}: inspect and bisect look into the layers of backend reference")
    return with_fp8(config, backend="reference")


def _require_rows_before(batches: list) -> None:
    if not batches:
        raise DataError("data.train: delayed scaling takes its scales from as many rows again; give more, or lower --rows")


def _calibrate(subject: Subject, batches: list) -> None:
    """Delayed scales as a run would have them: from rows before those that are looked at, gradients too."""
    if not delayed_layers(subject.policy):
        return
    _require_rows_before(batches)
    with calibrating(subject.policy):
        subject.loss(batches)
    subject.gradients()


def _row(one: Finding) -> tuple[str, ...]:
    scale = f"{one.scale_min:.2g}" if one.scale_min == one.scale_max else f"{one.scale_min:.2g} to {one.scale_max:.2g}"
    if_others = (f"{one.what_if[name]:.1f}" if name in one.what_if else "-" for name in SHAPES)
    level = one.level if not one.why else f"{one.level}: {one.why}"
    return (level, one.layer, one.operand, f"{one.amax:.3g}", scale, f"{one.underflow:.2%}", f"{one.overflow:.2%}",
            f"{one.sqnr_db:.1f}", f"{one.cosine:.5f}", *if_others)  # fmt: skip


def _verdict_row(one: Verdict) -> tuple[str, ...]:
    band = f"{one.seed_band:.2%}" if len(one.gaps) > 1 else "-"  # one seed has no spread
    return (one.recipe, f"{one.gap:+.2%}", f"{one.bound:.2%}", band, f"{one.gradient_cosine:.4f}",
            f"{one.logprob_drift:.4f}", f"{one.largest_logprob_drift:.3f}", f"{one.ratio_drift:.4f}",
            "within" if one.within else "TOO LARGE")  # fmt: skip


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [tuple(head), *map(tuple, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def _numbers_apart(name: str) -> list[tuple[int, str]]:
    """A key that puts layer 10 after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _print_json(outcome: Any) -> None:
    print(json.dumps(_finite(outcome), indent=1))


def _finite(value: Any) -> Any:
    """JSON has no infinity."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
