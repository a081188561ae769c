"""Stands in for a stage: keeps the same books as the real ones and learns nothing, so a run takes half a second.

Not a module of the tests: the fixture `workplace` copies it to sft.py, rm.py and ppo.py. It obeys $FAULT: kill, exit,
say 71, wait (for a signal), deaf (to signals).
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from rlhf.config.parse import Invocation, parse
from rlhf.runs.lineage import inputs_of
from rlhf.runs.lock import run_lock
from rlhf.runs.manifest import finish, new_manifest, versions, write_json, write_status

ACCURACY = {"eval/accuracy": 0.9, "eval/accuracy_low": 0.85, "eval/accuracy_high": 0.95}
IMPROVEMENT = {"before": {"helpful": 0.2, "gold": -0.5}, "after": {"helpful": 0.8, "gold": 1.5, "kl": 3.25}}


def main(stage: str, invocation: Invocation[Any], fault: str) -> None:
    if invocation.unit_test:
        print('{"unit test": "on standard output"}')
        sys.exit(1 if fault else 0)
    if os.environ.get("RANK", "0") != "0":
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        time.sleep(60)
    config, run = invocation.config, Path(invocation.config.output)
    with run_lock(run):
        inputs = inputs_of(stage, config)
        threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
        manifest = new_manifest(stage, config.model_dump(mode="json"), sys.argv, config.seed, 1, threads, inputs, versions())
        write_json(run / "run.json", manifest)
        (run / "checkpoints" / "step-1").mkdir(parents=True, exist_ok=True)
        misbehave(run, fault)
        contents = "".join(entry["digest"] or "" for entry in inputs.values())
        outputs = ("model", "critic") if stage == "ppo" else ("model",)
        for name in outputs:
            (run / name).mkdir(exist_ok=True)
            (run / name / "config.json").write_text("{}")
            (run / name / "weights").write_text(f"{config.seed} {contents}")
        if stage == "ppo":
            write_samples(run / "samples.jsonl")
        print(f"{stage} trained")
        finish(run, manifest, {"sft": {}, "rm": ACCURACY, "ppo": IMPROVEMENT}[stage], outputs)


def misbehave(run: Path, fault: str) -> None:
    def save_and_stop(number: int, frame: FrameType | None) -> NoReturn:
        write_status(run, "preempted", "asked to stop", 128 + number)
        sys.exit(128 + number)

    if fault in ("wait", "deaf"):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, save_and_stop if fault == "wait" else signal.SIG_IGN)
    write_status(run, "running")
    if fault in ("wait", "deaf"):
        time.sleep(60)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "exit":
        sys.exit(70)
    if fault == "say 71":
        write_status(run, "failed", "out of memory", 71)
        sys.exit(1)


def write_samples(file: Path) -> None:
    rows = [
        {"step": step, "prompt": prompt, "response": f"{prompt} at [step] {step}", "scores": {"gold": 0.0}}
        for step in (0, 1, 2)
        for prompt in ("one", "two")
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    name = Path(__file__).stem
    main(name, parse(name, sys.argv[1:]), os.environ.get("FAULT", ""))
