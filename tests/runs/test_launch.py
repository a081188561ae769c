"""Which command starts a stage, how it ends, and what a signal does, with real processes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf import paths
from rlhf.config.machines import Machines
from rlhf.errors import ConfigError, UsageError
from rlhf.runs import launch
from rlhf.runs.lock import run_lock
from rlhf.runs.manifest import read_status, write_status

CORES = len(os.sched_getaffinity(0))
LAUNCH_FILES = Path(__file__).resolve().parents[2] / "configs" / "launch"


def start(*flags: str) -> tuple[list[str], dict[str, str]]:
    return launch.command("sft", "cpu", 1, ["--config", "sft.yaml", *flags], threads=1)


@pytest.mark.usefixtures("workplace")
class TestCommand:
    def test_one_process_on_the_cpu_is_plain_python(self) -> None:
        argv, env = launch.command("rm", "cpu", 1, ["--config", "a b.yaml"])
        assert argv == [sys.executable, str(paths.STAGES / "rm.py"), "--config", "a b.yaml"]
        assert env == {
            "OMP_NUM_THREADS": str(CORES),
            "OMP_WAIT_POLICY": "PASSIVE",
            "TOKENIZERS_PARALLELISM": "false",
            "RLHF_EXPECTED_WORLD_SIZE": "1",
            "ACCELERATE_USE_CPU": "true",
        }

    def test_threads_are_the_configs_then_the_users(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OMP_NUM_THREADS", "3")
        assert launch.command("rm", "cpu", None, [])[1]["OMP_NUM_THREADS"] == "3"
        assert launch.command("rm", "cpu", 1, [], threads=5)[1]["OMP_NUM_THREADS"] == "5"

    def test_a_launch_file_that_is_none(self, tmp_path: Path) -> None:
        for text, expected in (("a: [", "not valid YAML"), ("", "not an Accelerate config")):
            (tmp_path / "mine.yaml").write_text(text)
            with pytest.raises(ConfigError, match=expected):
                launch.command("rm", str(tmp_path / "mine.yaml"), 1, [])

    def test_several_on_the_cpu_are_started_by_torchrun(self) -> None:
        argv, env = launch.command("ppo", "cpu", 2, ["--seed", "1"])
        assert argv[:5] == [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
        assert argv[-3:] == [str(paths.STAGES / "ppo.py"), "--seed", "1"]
        assert (env["OMP_NUM_THREADS"], env["RLHF_EXPECTED_WORLD_SIZE"]) == (str(max(1, CORES // 2)), "2")
        assert launch.command("ppo", "cpu", 2, [], threads=7)[1]["OMP_NUM_THREADS"] == "7"

    def test_all_else_is_started_by_accelerate(self, tmp_path: Path) -> None:
        argv, env = launch.command("sft", "ddp", 4, ["--seed", "1"])
        file = str(paths.CONFIGS / "launch" / "ddp.yaml")
        assert argv[1:7] == ["-m", "accelerate.commands.launch", "--config_file", file, "--num_processes", "4"]
        assert env["RLHF_EXPECTED_WORLD_SIZE"] == "4"

    def test_machines_are_those_of_the_command_line_or_else_of_the_file(self, tmp_path: Path) -> None:
        own = tmp_path / "own.yaml"
        own.write_text("distributed_type: MULTI_GPU\nnum_processes: 8\nnum_machines: 2\nmachine_rank: 1\n")
        with pytest.raises(UsageError, match="2 machines and no main_process_ip"):
            launch.machines_of(str(own), None)
        own.write_text(own.read_text() + "main_process_ip: node0\n")
        machines = launch.machines_of(str(own), None)
        assert machines == Machines(2, 1, "node0", 29500)
        argv, env = launch.command("sft", str(own), None, [], machines=machines)
        place = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "node0", "--main_process_port", "29500"]
        assert argv[5:-1] == ["--num_processes", "8", *place]
        assert env["OMP_NUM_THREADS"] == str(max(1, CORES // 4))
        assert launch.machines_of(str(own), Machines()) == Machines()
        assert launch.machines_of("ddp", None) == launch.machines_of("auto", None) == Machines()
        argv, env = launch.command("sft", str(own), None, [])
        assert argv[5:-1] == ["--num_processes", "8", "--num_machines", "1"]
        assert launch.command("sft", str(own), 1, [])[0][5:7] == ["--num_processes", "1"]

    def test_deepspeed_on_two_machines_is_started_on_each(self) -> None:
        """As accelerate itself understands our command: no pdsh from one machine to the other."""
        from accelerate.commands.launch import _validate_launch_command, launch_command_parser
        from accelerate.utils.launch import prepare_deepspeed_cmd_env

        argv, _ = launch.command("sft", "zero2", 4, ["--seed", "1"], machines=Machines(2, 1, "node0", 4711))
        arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(argv[3:]))
        arguments.deepspeed_fields_from_accelerate_config = ""
        started, _ = prepare_deepspeed_cmd_env(arguments)
        assert "pdsh" not in (started or ())
        assert arguments.machine_rank == 1

    def test_a_deepspeed_file_is_found_from_anywhere(self) -> None:
        assert not Path("configs").exists()
        for name in ("zero1", "zero2", "zero2-offload", "zero3", "zero3-offload"):
            launch.command("sft", name, 2, [])
            settings = yaml.safe_load((LAUNCH_FILES / f"{name}.yaml").read_text())["deepspeed_config"]
            file = paths.shipped_or_own(settings["deepspeed_config_file"])
            assert json.loads(file.read_text())["zero_optimization"]["stage"] == int(name[4])

    def test_a_deepspeed_file_that_is_nowhere(self) -> None:
        Path("own.yaml").write_text("distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds/mine.json}\n")
        with pytest.raises(UsageError, match=r"own\.yaml: deepspeed_config_file ds/mine\.json: no such file"):
            launch.command("sft", "own.yaml", 2, [])

    def test_several_machines(self) -> None:
        here = Machines(2, 1, "10.0.0.1", 4711)
        argv, env = launch.command("ppo", "cpu", 4, [], threads=1, machines=here)
        place = ["--nnodes", "2", "--node_rank", "1", "--master_addr", "10.0.0.1", "--master_port", "4711"]
        assert argv[3:-1] == ["--nproc_per_node", "2", *place]
        assert env["RLHF_EXPECTED_WORLD_SIZE"] == "4"
        argv, env = launch.command("ppo", "ddp", 16, [], machines=here)
        place = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.1", "--main_process_port", "4711"]
        assert argv[5:-1] == ["--num_processes", "16", *place]
        assert env["OMP_NUM_THREADS"] == str(max(1, CORES // 8))
        assert launch.command("ppo", "cpu", 2, [], machines=here)[0][3:5] == ["--nproc_per_node", "1"]
        for launcher in ("cpu", "ddp"):
            with pytest.raises(UsageError, match="--nproc: 5 processes do not divide among 2 machines; expected 4 or 6"):
                launch.command("ppo", launcher, 5, [], machines=here)
        assert launch.command("ppo", "cpu", None, [], machines=here)[1]["RLHF_EXPECTED_WORLD_SIZE"] == "2"
        with pytest.raises(UsageError, match="--nproc: 1 processes do not divide among 2 machines; expected 2"):
            launch.command("ppo", "cpu", 1, [], machines=here)

    @pytest.mark.parametrize(
        ("devices", "nproc", "chosen"), [([], 1, "python"), (["nvidia0"], 1, "gpu"), (["nvidia0", "nvidia1"], 2, "ddp")]
    )
    def test_auto(self, devices: list[str], nproc: int, chosen: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Path, "glob", lambda path, pattern: [path / name for name in devices])
        argv, _ = launch.command("sft", "auto", nproc, [])
        assert (Path(argv[4]).stem if devices else "python") == chosen

    @pytest.mark.parametrize(
        ("text", "nproc", "error", "message"),
        [
            ("mixed_precision: bf16", 1, ConfigError, "precision belongs to the stage's config"),
            ("use_cpu: true", 2, UsageError, "use --launch cpu --nproc N"),
            ("distributed_type: MULTI_CPU", 1, UsageError, "mpirun"),
            ("distributed_type: 'NO'", 2, UsageError, "--nproc asks for 2; use --launch ddp"),
        ],
    )
    def test_refused_files(self, text: str, nproc: int, error: type[Exception], message: str) -> None:
        Path("own.yaml").write_text(text)
        with pytest.raises(error, match=rf"own\.yaml: .*{message}"):
            launch.command("sft", "own.yaml", nproc, [])

    def test_an_unknown_name_lists_the_known(self) -> None:
        with pytest.raises(UsageError, match="there are auto, cpu, ddp, fsdp, gpu, multinode, zero1"):
            launch.command("sft", "tpu", 1, [])

    def test_the_printed_command_can_be_pasted(self) -> None:
        show = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['WORD']]))"
        text = launch.printable([sys.executable, "-c", show, "a b", "$HOME", "it's"], {"WORD": "x y"})
        done = subprocess.run(["sh", "-c", text], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [["a b", "$HOME", "it's"], "x y"]
        assert shlex.split(text)[0] == "WORD=x y"


@pytest.mark.parametrize("file", sorted(LAUNCH_FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_our_launch_files_leave_precision_alone(file: Path) -> None:
    assert yaml.safe_load(file.read_text()).get("mixed_precision", "no") == "no"


def finish(run: str = "sft") -> tuple[str, str, int]:
    status = read_status(Path(run))
    assert status is not None
    return status["state"], status["reason"], status["exit_code"]


@pytest.mark.usefixtures("workplace")
class TestEnd:
    def test_done(self) -> None:
        assert launch.run(*start(), Path("sft")) == 0
        assert finish() == ("done", "", 0)

    def test_what_the_status_says_wins_over_the_launcher(self, fault: Callable[[str], None]) -> None:
        fault("say 71")
        assert launch.run(*start(), Path("sft")) == 71
        assert finish() == ("failed", "out of memory", 71)

    def test_a_killed_stage_does_not_stay_running(self, fault: Callable[[str], None]) -> None:
        fault("kill")
        assert launch.run(*start(), Path("sft")) == 137
        state, reason, code = finish()
        assert (state, code) == ("failed", 137)
        assert "killed by SIGKILL" in reason

    def test_a_stage_that_dies_silently(self, fault: Callable[[str], None]) -> None:
        fault("exit")
        assert launch.run(*start(), Path("sft")) == 70
        reason = "ended with exit code 70 without saying why; see its output; the newest checkpoint is step-1"
        assert finish() == ("failed", reason, 70)

    def test_an_old_status_is_not_believed(self) -> None:
        Path("sft").mkdir()
        write_status(Path("sft"), "failed", "out of memory, yesterday", 71)
        assert launch.run([sys.executable, "-c", "raise SystemExit(3)"], {}, Path("sft")) == 3

    def test_the_status_of_another_run_is_left_alone(self) -> None:
        with run_lock(Path("sft")):
            write_status(Path("sft"), "running")
            assert launch.run([sys.executable, "-c", "raise SystemExit(75)"], {}, Path("sft")) == 75
            assert finish()[0] == "running"

    def test_standard_output_can_be_kept_clear(self, capfd: pytest.CaptureFixture[str]) -> None:
        launch.run([sys.executable, "-c", "print('progress')"], {}, None, stdout=2)
        assert capfd.readouterr() == ("", "progress\n")


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


def signals(run: Path, *numbers: int) -> None:
    """Send signals to this process, half a second apart, once the stage in the run says that it is running."""

    def send() -> None:
        wait_for(run / "status.json")
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    threading.Thread(target=send, daemon=True).start()


@pytest.mark.usefixtures("workplace")
class TestSignals:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
    def test_the_first_lets_the_stage_save(self, number: int, code: int, fault: Callable[[str], None]) -> None:
        fault("wait")
        before = signal.getsignal(number)
        signals(Path("sft"), number)
        assert launch.run(*start(), Path("sft")) == code
        assert finish() == ("preempted", "asked to stop", code)
        assert signal.getsignal(number) is before

    def test_the_second_kills(self, fault: Callable[[str], None]) -> None:
        fault("deaf")
        signals(Path("sft"), signal.SIGTERM, signal.SIGTERM)
        begun = time.monotonic()
        assert launch.run(*start(), Path("sft")) == 143
        assert time.monotonic() - begun < 30
        assert finish()[::2] == ("preempted", 143)

    def test_a_stage_under_torchrun_saves_too(self, fault: Callable[[str], None]) -> None:
        fault("wait")
        signals(Path("sft"), signal.SIGTERM)
        argv, env = launch.command("sft", "cpu", 2, ["--config", "sft.yaml"], threads=1)
        assert launch.run(argv, env, Path("sft")) == 143
        assert finish() == ("preempted", "asked to stop", 143)

    def test_the_signal_goes_past_the_launcher(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """torchrun would give the stage 30 s from then on; a launcher that hears nothing gives it all it needs."""
        Path("launcher.py").write_text(LAUNCHER)
        Path("stage.py").write_text(SLOW_TO_SAVE)
        monkeypatch.setenv("PYTHONPATH", str(Path.cwd()))
        signals(Path(), signal.SIGTERM)
        assert launch.run([sys.executable, "-m", "launcher"], {}, Path()) == 143
        assert Path("heard").read_text() == "stage"

    def test_ctrl_c_arrives_once(self) -> None:
        """A terminal sends it to the whole process group; to a stage the second one means stop at once."""
        code = f"import sys; from rlhf.runs.launch import run; run([sys.executable, '-c', {COUNT!r}], {{}}, None)"
        with subprocess.Popen([sys.executable, "-c", code], start_new_session=True) as process:
            wait_for(Path("ready"))
            os.killpg(process.pid, signal.SIGINT)
            process.wait(timeout=30)
        assert Path("count").read_text() == "1"


LAUNCHER = """
import signal, subprocess, sys
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: Path("heard").open("a").write("launcher"))
sys.exit(subprocess.call([sys.executable, "stage.py"]))
"""

SLOW_TO_SAVE = """
import signal, sys, time
from pathlib import Path
signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), Path("heard").open("a").write("stage"), sys.exit(1)))
Path("new").write_text(
    '{"state": "running", "reason": "", "exit_code": null, "pid": 1, "host": "", "time": "2026-01-01T00:00:00+00:00"}'
)
Path("new").rename("status.json")
time.sleep(60)
"""

COUNT = """
import signal, time
from pathlib import Path
received = []
signal.signal(signal.SIGINT, lambda *_: received.append(1))
Path("ready").touch()
end = time.monotonic() + 30
while not received and time.monotonic() < end:
    time.sleep(0.01)
time.sleep(0.5)
Path("count").write_text(str(len(received)))
"""


@pytest.mark.usefixtures("workplace")
def test_accelerate_starts_a_stage_with_our_cpu_file(capfd: pytest.CaptureFixture[str]) -> None:
    argv, env = launch.command("sft", str(LAUNCH_FILES / "cpu.yaml"), 1, ["--config", "sft.yaml"], threads=1)
    assert launch.run(argv, env, Path("sft")) == 0
    assert "sft trained" in capfd.readouterr().out
    assert finish()[0] == "done"
