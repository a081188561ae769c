"""A stage as it is run, `python benchmarks/_stage.py STAGE --flags`, that takes turns (_turns.py): a step is a turn.

Says, beside a turn's cost, the stage's own count of its tokens and metrics, and the CPU seconds of each phase. Evaluations are
not counted, and told with the step after them. With several processes, CPU seconds are those of all.
"""

from __future__ import annotations

import runpy
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from _turns import Turns


def main() -> None:
    from rlhf.paths import STAGES
    from rlhf.training.session import Training

    turns, phases, evaluations = Turns(), {}, []
    before: dict[str, float] = {}
    report, phase, record = Training.report, Training.phase, Training.record_evaluation

    def reported(train: Training, step: int, tokens: float, *rest: Any) -> Any:
        metrics = report(train, step, tokens, *rest)
        told = {"step": step + 1, "tokens": tokens, "metrics": metrics}
        told |= {"phases": dict(phases), "evaluations": list(evaluations)}
        if train.world_size > 1:
            now = sum(train.gather(time.process_time()))
            told["cpu_s"] = now - before.get("cpu", 0.0)
        if train.is_main:
            turns.end(**told)
        phases.clear()
        evaluations.clear()
        if train.world_size > 1:
            before["cpu"] = sum(train.gather(time.process_time()))
        return metrics

    @contextmanager
    def timed(train: Training, name: str) -> Iterator[None]:
        began = time.process_time()
        with phase(train, name):
            yield
        phases[name] = phases.get(name, 0.0) + time.process_time() - began

    def recorded(train: Training, step: int, values: Any, *rest: Any) -> Any:
        result = record(train, step, values, *rest)
        evaluations.append({"step": step} | {name.removeprefix("eval/"): value for name, value in result.items()})
        phases.clear()
        turns.begin()
        return result

    Training.report, Training.phase, Training.record_evaluation = reported, timed, recorded
    stage, *sys.argv[1:] = sys.argv[1:]
    runpy.run_path(str(STAGES / f"{stage}.py"), run_name="__main__")
    turns.end(evaluations=evaluations)


if __name__ == "__main__":
    main()
