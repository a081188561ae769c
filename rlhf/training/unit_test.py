"""`rlhf ppo --unit-test`: is PPO itself right, with this model, on this machine?

No SFT, no reward model run. The stage trains on a reward with a known optimum, once as it is and once negated; the invariants
of its first iteration are checked thoroughly; what was found is a table in plain words, and the exit code.
"""

from __future__ import annotations

import json
import math
import resource
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table

from rlhf.config.schema import PpoConfig
from rlhf.errors import CheckFailed
from rlhf.report.records import Records
from rlhf.training import probes
from rlhf.training.invariants import Checks
from rlhf.training.tiny import write_prompts, write_tiny_model

RANDOM, BUILT_IN = "random", "built-in"
AT_EACH_END = 3
"""Iterations at the start and at the end of a run whose mean rewards are compared."""
STANDARD_ERRORS = 3.0
"""How many standard errors a difference must have to count as learning."""

Ppo = Callable[..., None]


def unit_test(config: PpoConfig, ppo: Ppo, as_json: bool = False, learn: bool = True) -> NoReturn:
    """Runs the test, prints the table (or JSON) and exits 0 or 1; `learn` off leaves out the runs that show learning.

    Raises:
        SystemExit: always, with code 0 or 1.
    """
    checks = Checks()
    with tempfile.TemporaryDirectory(prefix="rlhf-unit-test-") as directory:
        config = _filled_in(config, Path(directory))
        up = _run(_changed(config, output=f"{directory}/up"), ppo, checks, length=None if learn else 1)
        if learn and not checks.failed():
            down = _run(_changed(config, output=f"{directory}/down", weight=-config.reward.weight), ppo, None)
            _expect_learning(checks, up, down)
    figures = _figures(up)
    passed = not checks.failed()
    if as_json:
        print(
            json.dumps({"passed": passed, "checks": [asdict(check) for check in checks.results], "figures": figures}, indent=2)
        )
    else:
        _print(checks, figures)
    sys.exit(0 if passed else 1)


def _filled_in(config: PpoConfig, directory: Path) -> PpoConfig:
    """The config with the random model and the built-in prompts put in their places."""
    tiny = config.roles.actor == RANDOM
    if tiny:
        write_tiny_model(directory, config.seed)
        config = _nested(config, "roles", actor=str(directory / "model"))
    if config.roles.critic == RANDOM:
        config = _nested(config, "roles", critic=str(directory / "critic") if tiny else "zero")
    if config.data.train == BUILT_IN:
        write_prompts(directory / "prompts.jsonl", tiny)
        config = _nested(config, "data", train=str(directory / "prompts.jsonl"))
    return config


def _nested(config: PpoConfig, section: str, **values: Any) -> PpoConfig:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _changed(config: PpoConfig, output: str, weight: float | None = None) -> PpoConfig:
    config = config.model_copy(update={"output": output})
    return config if weight is None else _nested(config, "reward", weight=weight)


def _run(config: PpoConfig, ppo: Ppo, checks: Checks | None, length: int | None = None) -> list[dict[str, Any]]:
    """Metrics of every iteration. With `checks` the first one is probed, and frozen weights are compared at the end."""
    if length is not None:
        config = _nested(config, "schedule", length=length)
    frozen: dict[str, tuple[Any, str]] = {}

    def probe(own: Checks, train, roles, policy, experience, loss_of) -> None:
        assert checks is not None
        inner = train.accelerator.unwrap_model(policy)
        checks.results = own.results  # one list: what the run checks itself stands in the table too
        probes.probe_forward(checks, inner, experience, config.rollout.temperature)
        probes.probe_dropout(checks, policy, experience, train.device)
        probes.probe_credit(checks, experience, config)
        probes.probe_loss(checks, experience, loss_of, inner.parameters())
        for name, role in {"reference": roles.reference, **roles.rewards}.items():
            if role is not None:
                model = train.accelerator.unwrap_model(role.model)
                frozen[name] = partial(model.weights_of, role.role), probes.weights_digest(model.weights_of(role.role))

    try:
        ppo(config, probe=probe if checks is not None else None)
    except CheckFailed:
        if checks is None or not checks.failed():
            raise
    for name, (weights, before) in frozen.items():
        after = probes.weights_digest(weights())
        assert checks is not None
        checks.expect(
            f"frozen {name}",
            after == before,
            after[:8],
            f"the weights of the {name} are, to the bit, those it started with",
        )
    return Records(Path(config.output) / "metrics.jsonl").read()


def _expect_learning(checks: Checks, up: list[dict[str, Any]], down: list[dict[str, Any]]) -> None:
    rise, fall = _change(up), _change(down)
    checks.expect(
        "reward rises",
        rise[0] > STANDARD_ERRORS * rise[1],
        f"{rise[0]:+.2f} +- {rise[1]:.2f}",
        "PPO finds more of what is rewarded",
    )
    # A reward near its floor cannot fall; it must then at least not rise.
    lower = fall[0] < -STANDARD_ERRORS * fall[1] or _mean(down[:AT_EACH_END]) < STANDARD_ERRORS * fall[1]
    apart = _mean(up[-AT_EACH_END:]) - _mean(down[-AT_EACH_END:]) > STANDARD_ERRORS * math.hypot(rise[1], fall[1])
    checks.expect(
        "reward falls when negated",
        lower and apart,
        f"{fall[0]:+.2f} +- {fall[1]:.2f}",
        "with the sign of the reward turned, PPO avoids it",
    )


def _change(metrics: list[dict[str, Any]]) -> tuple[float, float]:
    """(difference of mean score between end and start, its standard error from the spread between iterations)."""
    first, last = metrics[:AT_EACH_END], metrics[-AT_EACH_END:]
    errors = [m["reward/score_std"] / math.sqrt(m["rollout/count"] * AT_EACH_END) for m in (first[0], last[-1])]
    return _mean(last) - _mean(first), math.hypot(*errors)


def _mean(metrics: list[dict[str, Any]]) -> float:
    return statistics.fmean(m["reward/score"] for m in metrics)


def _figures(metrics: list[dict[str, Any]]) -> dict[str, float]:
    if not metrics:
        return {}
    seconds = {name: sum(m[name] for m in metrics) for name in metrics[0] if name.startswith("time/")}
    figures: dict[str, float] = {
        name.removeprefix("time/").removesuffix("_s") + " seconds": round(value, 2) for name, value in seconds.items()
    }
    figures["tokens per second"] = round(sum(m["tokens"] for m in metrics) / seconds["time/step_s"])
    figures["peak memory MB"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return figures


def _print(checks: Checks, figures: dict[str, float]) -> None:
    table = Table(title="rlhf ppo --unit-test", title_justify="left")
    for column in ("", "check", "measured", "holds when"):
        table.add_column(column)
    for check in checks.results:
        table.add_row("ok" if check.passed else "FAILED", check.name, check.measured, check.meaning)
    console = Console()
    console.print(table)
    console.print("   ".join(f"{name} {value}" for name, value in figures.items()), highlight=False)
    verdict = f"failed: {', '.join(check.name for check in checks.failed())}" if checks.failed() else "every check holds"
    console.print(verdict)
