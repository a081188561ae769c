"""A stage from the command line: checks before it starts, what it says, and what a dry run shows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.config.load import load
from rlhf.config.schema import STAGES
from rlhf.errors import OutputError
from rlhf.runs.dry_run import batches
from rlhf.runs.lock import check_output, run_lock
from rlhf.runs.manifest import read_status, write_status

pytestmark = pytest.mark.usefixtures("workplace")


def test_start_then_keep(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", "sft.yaml"]) == 0
    said = capfd.readouterr().out
    assert "sft: starting sft" in said
    assert f"RLHF_EXPECTED_WORLD_SIZE=1 ACCELERATE_USE_CPU=true {sys.executable} " in said
    assert "sft trained" in said
    write_status(Path("sft"), "running")  # as a kill after the last write of run.json leaves it
    assert main(["sft", "--config", "sft.yaml"]) == 0
    assert capfd.readouterr().out == "sft: done, kept: sft\n"
    status = read_status(Path("sft"))
    assert status is not None
    assert status["state"] == "done"


def test_the_cli_says_what_a_killed_stage_cannot(fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    fault("kill")
    assert main(["sft", "--config", "sft.yaml"]) == 137
    assert "rlhf: sft: killed by SIGKILL" in capfd.readouterr().err


def test_json(fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    fault("say 71")
    assert main(["sft", "--config", "sft.yaml", "--json"]) == 71
    outcome = json.loads(capfd.readouterr().out)
    assert (outcome["status"]["state"], outcome["status"]["exit_code"], outcome["result"]) == ("failed", 71, {})
    fault("")
    assert main(["sft", "--config", "sft.yaml", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["status"]["state"] == "done"


def test_a_busy_directory_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with run_lock(Path("sft")):
        assert main(["sft", "--config", "sft.yaml"]) == 75
    assert f"pid {os.getpid()}" in capfd.readouterr().err


def test_the_unit_test_needs_no_run(fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(Path.cwd().rglob("*"))
    assert main(["ppo", "--unit-test", "--config", "ppo.yaml", "--json"]) == 0
    assert json.loads(capfd.readouterr().out) == {"unit test": "on standard output"}
    fault("broken")
    assert main(["ppo", "--unit-test", "--config", "ppo.yaml"]) == 1
    assert sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize("output", ["sft.yaml", "sft.yaml/run", "sft.yaml/a/b"])
def test_an_output_below_a_file(output: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", "sft.yaml", "--output", output]) == 73
    assert "sft.yaml is not a directory; choose another --output" in capfd.readouterr().err


def test_an_output_that_may_not_be_written(workplace: Path) -> None:
    """In a child that is nobody: root may write anywhere."""
    if os.geteuid() != 0:
        Path("locked").mkdir(mode=0o555)
        with pytest.raises(OutputError, match=r"no permission to write in .*locked"):
            check_output(Path("locked/run"))
        return
    code = (
        "import os; from pathlib import Path; from rlhf.errors import OutputError\n"
        "from rlhf.runs.lock import check_output\n"
        "os.setuid(65534)\n"
        "try: check_output(Path('/run_of_nobody'))\n"
        "except OutputError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no permission to write in /" in done.stdout


def test_an_output_that_can_be_made_is_not_made() -> None:
    check_output(Path("a/b/c"))
    assert not Path("a").exists()


def test_a_dry_run_shows_all_and_touches_nothing(make_run: Callable[..., None], capfd: pytest.CaptureFixture[str]) -> None:
    make_run("sft")
    before = sorted(Path.cwd().rglob("*"))
    assert main(["rm", "--config", "rm.yaml", "--nproc", "2", "--launch", "cpu", "--dry-run"]) == 0
    said = capfd.readouterr().out
    assert '"path": "sft"' in said
    assert "64 prompts per optimizer step = 2 processes x 8 prompts per micro-batch x 4 micro-batches" in said
    assert "torch.distributed.run --nproc_per_node 2" in said
    assert "--dry-run" not in said
    assert "  rm/checkpoints/step-N/\n  rm/model/\n" in said
    assert sorted(Path.cwd().rglob("*")) == before


def lines(stage: str, processes: int, **flags: object) -> list[str]:
    overrides = [(name.replace("__", "."), str(value)) for name, value in flags.items()]
    return batches(load(STAGES[stage], Path(f"{stage}.yaml"), overrides), processes)


def test_batches_of_sft() -> None:
    assert lines("sft", 1, batch_size=32, micro_batch_size=32, schedule__length=700, schedule__unit="steps") == [
        "32 rows per optimizer step = 1 process x 32 rows per micro-batch x 1 micro-batch",
        "700 optimizer steps in all: 22400 rows",
    ]
    uneven, epochs = lines("sft", 3, batch_size=64, micro_batch_size=8, schedule__length=2)
    assert uneven.endswith("= 3 processes x up to 22 rows, in 3 micro-batches of up to 8; 63 or 66 would divide evenly")
    assert epochs == "2 epochs: one optimizer step for every 64 rows of each"
    packed, tokens = lines("sft", 1, data__packing="true", schedule__unit="tokens", schedule__length=5000)
    assert packed.startswith("64 sequences per optimizer step")
    assert "5000 tokens" in tokens


def test_batches_of_ppo() -> None:
    sampled, steps, minibatch, total = lines(
        "ppo", 2, rollout__batch_size=48, rollout__samples_per_prompt=2, ppo__minibatch_size=32, ppo__epochs=2
    )
    assert sampled.startswith("96 replies per iteration = 48 prompts x 2 samples")
    assert steps == "6 optimizer steps per iteration = 3 minibatches x 2 epochs"
    assert minibatch.endswith("32 replies per optimizer step = 2 processes x 8 replies per micro-batch x 2 micro-batches")
    assert total == "100 iterations: 600 optimizer steps, 9600 replies in all"
    assert "one iteration for every 64 prompts" in lines("ppo", 1, schedule__unit="epochs")[-1]


def test_another_machine_has_nothing_to_join_once_the_run_is_done(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", "--config", "sft.yaml"]) == 0
    before = {file: file.stat().st_mtime_ns for file in Path.cwd().rglob("*")}
    machine = ["--launch", "cpu", "--nproc", "2", "--num-machines", "2", "--machine-rank", "1", "--main-address", "nowhere"]
    assert main(["sft", "--config", "sft.yaml", *machine]) == 0
    assert capfd.readouterr().out.endswith("sft: done, kept: sft\n")
    assert {file: file.stat().st_mtime_ns for file in Path.cwd().rglob("*")} == before
