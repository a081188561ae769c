"""What is measured side by side: child processes that take turns (_turns.py), and the medians of what they say.

Nothing here imports torch: a child's peak memory begins with that of the process that started it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from _turns import MARK

HERE = Path(__file__).parent
Turn = dict[str, Any]


@dataclass
class Side:
    """One of those compared: a command whose process takes turns, each of so many `steps`."""

    name: str
    command: Sequence[str | Path]
    steps: int = 1
    launcher: bool = False
    """Whether the process is the one that starts those of a stage."""
    turns: list[Turn] = field(default_factory=list)
    warm_up: list[Turn] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self, place: Path, threads: int) -> None:
        """Ends with the first step, in which it imports and warms up."""
        self.log = place / f"{self.name}.log"
        with self.log.open("w") as log:
            pipe = subprocess.PIPE
            self.process = subprocess.Popen(
                list(map(str, self.command)), env=environment(threads), stdin=pipe, stdout=pipe, stderr=log, text=True
            )
        self.warm_up.append(self._next())

    def take_turn(self, counts: bool) -> None:
        stdin, steps = self._pipe("stdin"), []
        for _ in range(self.steps):
            stdin.write("\n")
            stdin.flush()
            steps.append(self._next())
        (self.turns if counts else self.warm_up).append(together(steps))

    def stop(self) -> None:
        """At once: what a run writes at its end is no part of a turn. A launcher ends by itself when its stage has gone."""
        if self.process:
            self._pipe("stdin").close()
            if not self.launcher:
                self.process.kill()
            self.process.wait()

    def _next(self) -> Turn:
        for line in self._pipe("stdout"):
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        assert self.process
        code = self.process.wait()
        sys.exit(f"{self.name} ended with {code} before its turn was over:\n{self.log.read_text()[-4000:]}")

    def _pipe(self, name: str) -> IO[str]:
        pipe = getattr(self.process, name)
        assert pipe is not None
        return pipe


def together(steps: Sequence[Turn]) -> Turn:
    """Several steps as one turn: what they cost and did, summed."""
    summed = {
        name: sum(step[name] for step in steps) for name in ("cpu_s", "wall_s", "tokens", "reply_tokens") if name in steps[0]
    }
    names = {name for step in steps for name in step.get("phases", {})}
    phases = {name: sum(step["phases"].get(name, 0.0) for step in steps) for name in names}
    evaluations = [one for step in steps for one in step.get("evaluations", [])]
    return steps[-1] | summed | {"phases": phases, "evaluations": evaluations}


def environment(threads: int) -> dict[str, str]:
    """Threads that wait without spinning: with two of them, spinning costs more CPU than the work (docs/performance.md)."""
    fixed = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
             "CUDA_VISIBLE_DEVICES": "", "TRL_EXPERIMENTAL_SILENCE": "1", "OMP_NUM_THREADS": str(threads)}  # fmt: skip
    path = os.pathsep.join(filter(None, [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH")]))
    return os.environ | fixed | {"PYTHONPATH": path}


def take_turns(sides: Sequence[Side], place: Path, threads: int, repeats: int, warm_up: int) -> None:
    """Each of `sides` takes `warm_up` turns that do not count and `repeats` that do, A B A B; the first is its start."""
    try:
        for side in sides:
            side.start(place, threads)
        for number in range(1, warm_up + repeats):
            for side in sides if number % 2 else reversed(sides):
                side.take_turn(counts=number >= warm_up)
    finally:
        for side in sides:
            side.stop()


def spread(values: Iterable[float], digits: int = 3) -> dict[str, float]:
    values = list(values)
    return {name: round(of(values), digits) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def figures(side: Side, work: Mapping[str, Callable[[Turn], float]]) -> dict[str, Any]:
    """Work per CPU second and per wall second of each turn, in each unit of `work`; CPU seconds a turn; peak memory.

    A side's name ends with its micro-batch.
    """
    result: dict[str, Any] = {}
    for unit, amount in work.items():
        result[f"{unit}_per_cpu_s"] = spread(amount(turn) / turn["cpu_s"] for turn in side.turns)
        result[f"{unit}_per_wall_s"] = spread(amount(turn) / turn["wall_s"] for turn in side.turns)
    result["cpu_s"] = spread(turn["cpu_s"] for turn in side.turns)
    result["peak_mib"] = max(turn["peak_mib"] for turn in side.turns)
    result["turns"] = len(side.turns)
    result["micro_batch_size"] = int(side.name.rpartition("-")[2])
    return result


def best(found: Sequence[dict[str, Any]], unit: str) -> dict[str, Any]:
    """Of one side with several micro-batches that with which most is done; of the others their medians."""
    result = max(found, key=lambda each: each[f"{unit}_per_cpu_s"]["median"])
    others = {str(each["micro_batch_size"]): each[f"{unit}_per_cpu_s"]["median"] for each in found if each is not result}
    return result | ({f"{unit}_per_cpu_s_at_other_micro": others} if others else {})


def stage(
    name: str, stage: str, fields: Mapping[str, Any], more: Sequence[str] = (), steps: int = 1, processes: int = 1
) -> Side:
    """One of our stages, as its users run it but for the turns."""
    flags = [f"--{field}={value}" for field, value in fields.items()]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return Side(name, [sys.executable, *launcher, HERE / "_stage.py", stage, *flags, *more], steps, processes > 1)


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A benchmark's own words, and what comes after `--`, which is for our stage."""
    cut = list(words).index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1 :])


def ratio(ours: Mapping[str, Any], theirs: Mapping[str, Any], figure: str) -> float:
    """Of medians."""
    return round(ours[figure]["median"] / theirs[figure]["median"], 2)


def options(about: str | None, repeats: int = 3) -> argparse.ArgumentParser:
    """What every benchmark of sides can be told."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=repeats, help="turns of each that count")
    parser.add_argument("--warm-up", type=int, default=1, help="turns of each that do not; the first is the start")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="where to work; what is found there is used again (default: temporary)")
    return parser
