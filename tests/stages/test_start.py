"""What a stage imports before its first step is what it uses: each of the rest costs every start up to five CPU seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest
from harness import flags

from rlhf.paths import STAGES

FOR_SOME = {
    "bitsandbytes", "datasets", "deepspeed", "matplotlib", "pandas", "peft", "pyarrow", "scipy", "sklearn", "tensorboard",
    "torchvision", "trl", "tyro",
    "rlhf.checkpoints.convert", "rlhf.models.adapters", "rlhf.models.gguf", "rlhf.models.megatron",
    "rlhf.training.engines.fsdp", "rlhf.training.engines.zero", "rlhf.training.fp8.inspection",
    "rlhf.training.probes", "rlhf.training.unit_test",
}  # fmt: skip
PROGRAM = f"""
import runpy, sys
from rlhf.training.session import Training
def optimizer_step(*arguments, **options):
    print("IMPORTED", *sorted({FOR_SOME!r} & set(sys.modules)), flush=True)
    sys.exit(0)
Training.optimizer_step = optimizer_step
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


def imported(stage: str, arguments: list[str]) -> set[str]:
    """Of what only some runs need: what a fresh process holds at its first optimizer step."""
    command = [sys.executable, "-c", PROGRAM, str(STAGES / f"{stage}.py"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = [line.split()[1:] for line in run.stdout.splitlines() if line.startswith("IMPORTED")]
    assert lines, run.stderr
    return set(lines[0])


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_a_plain_stage_imports_nothing_that_only_others_use(stage, world, tmp_path):
    assert imported(stage, flags(stage, world, tmp_path / "run", data__eval="null")) == set()


def test_what_a_stage_does_use_is_seen(world, tmp_path):
    with_lora = imported("sft", flags("sft", world, tmp_path / "run", data__eval="null", lora__rank=2))
    assert "peft" in with_lora
