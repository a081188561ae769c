"""Stages run whole, on models of a few thousand weights, each in a fork of the test process: imports are paid once."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import torch

from rlhf.cli import main
from rlhf.config.parse import parse
from rlhf.errors import RlhfError
from rlhf.paths import CONFIGS, STAGES
from rlhf.training.session import Training

torch.set_num_threads(1)


def stage_module(stage: str) -> ModuleType:
    """A fresh copy of the recipe, to run or to break."""
    spec = importlib.util.spec_from_file_location(f"stage_{stage}", STAGES / f"{stage}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def fork(body, *arguments, log: Path | None = None) -> int:
    """Starts `body` in a child and returns its pid; the child's exit code is what the command's would be."""
    pid = os.fork()
    if pid:
        return pid
    code = 0
    try:
        if log is not None:
            sys.stdout = sys.stderr = log.open("a", buffering=1)
        body(*arguments)
    except SystemExit as ending:
        code = int(ending.code or 0)
    except RlhfError as error:
        print(f"rlhf: error: {error}", flush=True)
        code = error.exit_code
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(pid: int, seconds: float = 120) -> int:
    """The exit code of a child. One that takes longer hangs, as ranks do that wait for each other, and is killed."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = math.inf
        time.sleep(0.01)


def wait_until(what: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def run(stage: str, arguments: list[str], log: Path | None = None, change=None) -> int:
    """Runs a stage to its end; `change(module)` may break it first."""
    return wait(start(stage, arguments, log, change))


def command(arguments: list[str], log: Path) -> int:
    """Runs a command that is no stage, or one that fails before its stage is launched."""
    return wait(fork(lambda: sys.exit(main(arguments)), log=log))


def start(
    stage: str, arguments: list[str], log: Path | None = None, change=None, environment: dict[str, str] | None = None
) -> int:
    def body() -> None:
        os.environ.update(environment or {})
        module = stage_module(stage)
        if change is not None:
            change(module)
        module.main(parse(stage, arguments))

    return fork(body, log=log)


ENGINES = {
    "ddp": {},
    **{
        name: {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        }
        for name, file in {
            "zero1": CONFIGS / "deepspeed" / "zero1.json",
            "zero2": CONFIGS / "deepspeed" / "zero2.json",
            "zero3": Path(__file__).with_name("zero3.json"),  # ours leaves small tensors whole, as all of a test's are
        }.items()
    },
    "fsdp": {"ACCELERATE_USE_FSDP": "true"},
}
"""What `accelerate launch` sets for the launch file of that name."""


def start_on(
    processes: int, stage: str, arguments: list[str], log: Path, change=None, engine: str = "ddp", of_last: Sequence[str] = ()
) -> list[int]:
    """Starts a run in one process, or in several as a launcher would; returns their pids. The last may have its own flags."""
    if processes == 1:
        return [start(stage, arguments, log, change)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    common |= ENGINES[engine]
    others = {flag.split("=")[0] for flag in of_last}
    own = [flag for flag in arguments if flag.split("=")[0] not in others] + list(of_last)
    return [
        start(
            stage,
            own if rank == processes - 1 else arguments,
            log,
            change,
            common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]


def before_each_step(act: Callable[[Training], object]) -> Callable[[ModuleType], None]:
    """A `change` that calls `act` as a step begins."""

    def change(module: ModuleType) -> None:
        right = Training.one_step

        def one_step(train: Training):
            act(train)
            yield from right(train)

        Training.one_step = one_step  # in the fork

    return change


def run_on_two(stage: str, arguments: list[str], log: Path, change=None, **more) -> list[int]:
    """Exit codes of a run in two processes."""
    return [wait(pid) for pid in start_on(2, stage, arguments, log, change, **more)]


def metrics(output: Path) -> list[dict]:
    """metrics.jsonl without what may differ between equal runs."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("time/")} for line in lines]


def left(output: Path, steps: int = 8) -> dict[str, object]:
    """All that must be equal to the bit: metrics, samples, results, and the training checkpoint of the last of `steps`."""
    files = [path for part in ("model", "critic", f"checkpoints/step-{steps}") for path in sorted((output / part).glob("*"))]
    contents = {str(path.relative_to(output)): path.read_bytes() for path in files}
    samples = (output / "samples.jsonl").read_text() if (output / "samples.jsonl").exists() else ""
    return contents | {"metrics": metrics(output), "samples": samples}


def flags(stage: str, world: Path, output: Path, **more: object) -> list[str]:
    """A small run of a stage; keyword names have `__` for the dots of a field."""
    common = {"output": output, "threads": 1, "schedule__length": 4, "schedule__unit": "steps", "checkpoint__every": 1}
    own = {
        "sft": {"model": world / "model", "data": world / "sft.jsonl", "data__eval": world / "sft.jsonl", "batch_size": 9,
                "optimizer__lr": 1e-3},
        "rm": {"model": world / "model", "data": world / "pairs.jsonl", "data__eval": world / "pairs.jsonl", "batch_size": 9,
               "optimizer__lr": 1e-3},
        "dpo": {"model": world / "model", "data": world / "pairs.jsonl", "data__eval": world / "pairs.jsonl", "batch_size": 9,
                "optimizer__lr": 1e-3},
        "kto": {"model": world / "model", "data": world / "rated.jsonl", "data__eval": world / "pairs.jsonl", "batch_size": 9,
                "optimizer__lr": 1e-3},
        "ppo": {"actor": world / "model", "critic": world / "critic", "reward": "count:a", "data": world / "prompts.jsonl",
                "data__eval": world / "prompts.jsonl", "data__eval_limit": 6, "rollout__batch_size": 14,
                "rollout__max_new_tokens": 6, "ppo__minibatch_size": 7, "ppo__epochs": 2, "optimizer__lr": 1e-3,
                "optimizer__critic_lr": 1e-3, "rollout__temperature": 0.7},
        "grpo": {"actor": world / "model", "reward": "count:a", "data": world / "prompts.jsonl",
                 "data__eval": world / "prompts.jsonl", "data__eval_limit": 6, "rollout__batch_size": 7,
                 "rollout__samples_per_prompt": 3, "rollout__max_new_tokens": 6, "grpo__minibatch_size": 7,
                 "grpo__epochs": 2, "optimizer__lr": 1e-3, "rollout__temperature": 0.7},
    }[stage]  # fmt: skip
    merged = {**common, **own, **more}
    return [f"--{name.replace('__', '.')}={value}" for name, value in merged.items()]
