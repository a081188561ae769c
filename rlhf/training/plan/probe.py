"""A stage as it is run, with its memory and speed told: `python probe.py RESULT STAGE --flags`; and who starts it.

The peak is the process's largest resident memory (VmHWM) beyond what it had when everything was imported and no weight was
opened; on a GPU what torch had allocated at most.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config.parse import Invocation
from rlhf.errors import CheckFailed, OutOfMemory
from rlhf.runs import launch

STEPS, ITERATIONS = 20, 3
"""Of a probe: optimizer steps, or iterations of PPO and GRPO; the first is not timed."""
MEMORY_STEPS = 2
"""After which a peak on a CPU is what it will be: moments come with the first, and the second has them and activations."""

GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""glibc then gives every freed block of 64 KiB or more back to the system at once. By itself it raises the threshold to 32 MiB,
and what lies below stays in its heap: a peak would be that of the heap's gaps, and differ from run to run (mallopt(3))."""


@dataclass(frozen=True)
class Measured:
    peak: float
    """Bytes beyond `base`; of rank 0"""
    base: float
    """Bytes of the process before any weight was opened; on a GPU 0"""
    tokens_per_second: float
    """Of all processes, without the first step"""
    seconds_per_step: float
    steps: int


def measure(invocation: Invocation[Any], steps: int, give_back: bool) -> Measured:
    """Runs the first steps of the stage, into a directory that is gone afterwards.

    Raises:
        OutOfMemory: they did not fit.
        CheckFailed: the stage failed; its own words are above.
    """
    stage, config = invocation.stage, invocation.config
    with tempfile.TemporaryDirectory(prefix="rlhf-plan-") as place:
        result = Path(place) / "probe.json"
        own = {"output": str(Path(place) / "run"), "schedule.unit": "steps", "schedule.length": str(steps)}
        own |= {"checkpoint.every": "0", "report.trackers": "", "report.profile": "false"}
        if getattr(config, "normalize", "none") != "chosen":  # which needs held-out rows
            own["data.eval"] = "none"
        names = {f"--{name}" for name in (*own, "resume")}
        arguments = _without(invocation.arguments, names) + [f"--{name}={value}" for name, value in own.items()]
        argv, env = launch.command(stage, invocation.launch, invocation.nproc, arguments, config.threads)
        script = next(index for index, word in enumerate(argv) if word.endswith(f"{stage}.py"))
        argv[script : script + 1] = [__file__, str(result), stage]
        env |= GIVE_BACK if give_back else {}
        done = subprocess.run(
            argv, env=os.environ | env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        if done.returncode or not result.is_file():
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-3:]
            kind = OutOfMemory if done.returncode in (OutOfMemory.exit_code, 137, -9) else CheckFailed
            raise kind(f"the probe of {stage} ended with {done.returncode}:\n" + "\n".join(last))
        found = json.loads(result.read_text(encoding="utf-8"))
    timed = found["steps"][1:] or found["steps"]
    seconds, tokens = sum(one["seconds"] for one in timed), sum(one["tokens"] for one in timed)
    return Measured(found["peak"], found["base"], tokens / seconds, seconds / len(timed), len(found["steps"]))


def _without(arguments: list[str], names: set[str]) -> list[str]:
    """The flags without those of these names, in either form: `--name=value`, `--name value`."""
    kept, dropping = [], False
    for word in arguments:
        if word.startswith("--"):
            dropping = word.split("=")[0] in names
        if not dropping:
            kept.append(word)
    return kept


def main() -> None:
    result, stage, *arguments = sys.argv[1:]
    sys.argv = [stage, *arguments]

    import torch

    from rlhf.config.parse import parse
    from rlhf.paths import STAGES
    from rlhf.training.entry import run_stage
    from rlhf.training.session import Training

    recipe = runpy.run_path(str(STAGES / f"{stage}.py"), run_name="probed")
    told: dict[str, Any] = {"base": _everything_imported(parse(stage, arguments).config), "steps": []}
    report = Training.report

    def reported(train: Training, step: int, tokens: float, *rest: Any) -> Any:
        seconds = time.monotonic() - train._started
        found = report(train, step, tokens, *rest)
        told["steps"].append({"seconds": seconds, "tokens": tokens})
        told["peak"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak() - told["base"]
        if train.is_main:
            Path(result).write_text(json.dumps(told), encoding="utf-8")
        return found

    Training.report = reported  # pyright: ignore[reportAttributeAccessIssue]
    run_stage(stage, recipe["main"])


def _everything_imported(config: Any) -> float:
    """Bytes of this process, its models' classes imported and every kind of operator called once."""
    import torch

    from rlhf.config.schema import PolicyStage
    from rlhf.models.load import load_tokenizer
    from rlhf.training.plan.cast import cast_of

    cast_of(config)
    load_tokenizer(config.roles.actor if isinstance(config, PolicyStage) else config.model.path, config.trust_remote_code)
    layer = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    heads = layer(torch.zeros(1, 2, 8, 64))
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).sum().backward()
    torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
    optimizer.step()
    return 0.0 if torch.cuda.is_available() else status_of_process("VmRSS")


def _peak() -> float:
    return status_of_process("VmHWM")


def status_of_process(name: str) -> float:
    """Bytes, as the kernel has them (proc(5)); where there is no /proc, the peak for both."""
    file = Path("/proc/self/status")
    if file.is_file():
        line = next(line for line in file.read_text().splitlines() if line.startswith(f"{name}:"))
        return float(line.split()[1]) * 1024
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
