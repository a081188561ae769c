"""Starting a stage as a child process, passing signals on to it, and learning how it ended.

The child has a process group of its own, so that Ctrl-C reaches it once, through us, and not a second time from the
terminal: to a stage the second signal means stop at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from rlhf import paths
from rlhf.config.engines import Engine
from rlhf.config.machines import ONE_MACHINE, PORT, Machines
from rlhf.errors import Locked, UsageError
from rlhf.runs.launch_file import find_launch_file, read_launch_file
from rlhf.runs.lock import check_unlocked
from rlhf.runs.manifest import LAUNCH, STATUS, read_status, write_status

LAUNCHERS = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.launch"}


def command(
    stage: str, launch: str, nproc: int | None, arguments: list[str], threads: int = 0, machines: Machines = ONE_MACHINE
) -> tuple[list[str], dict[str, str]]:
    """The command line that runs a stage on this machine, and the environment variables it needs.

    Args:
        launch: `auto`, `cpu`, the name of a file in configs/launch, or the path of an Accelerate config file.
        nproc: processes over all machines; None: as many as the launch file says.
        arguments: the stage's own.
        threads: CPU threads of each process; 0: OMP_NUM_THREADS, or this machine's cores shared out evenly.
        machines: where there are several, the same number of processes on each.

    Raises:
        UsageError: no such launch file, or it cannot start as many processes, or they do not divide among the machines.
        ConfigError: the launch file sets a precision, which is the stage config's to say.
    """
    asked = _words(launch, nproc, machines)
    if launch == "auto":
        launch = "cpu" if not any(Path("/dev").glob("nvidia[0-9]*")) else "ddp" if (nproc or 1) > 1 else "gpu"
    script = [str(paths.STAGES / f"{stage}.py"), *arguments]
    if launch == "cpu":
        nproc = nproc or machines.count
        local = _share(nproc, machines.count)
        return _on_cpu(script, local, machines), _environment(nproc, local, threads) | {"ACCELERATE_USE_CPU": "true"} | asked
    file = find_launch_file(launch)
    settings = read_launch_file(file, nproc or 1)
    settings.engine(file)
    processes = nproc or settings.num_processes
    options = ["--config_file", str(file), "--num_processes", str(processes), "--num_machines", str(machines.count)]
    if machines.count > 1:
        options += ["--machine_rank", str(machines.rank)]
        options += ["--main_process_ip", machines.address, "--main_process_port", str(machines.port)]
        if settings.distributed_type == "DEEPSPEED":
            # the command runs on every machine; accelerate's default would have one start the others through pdsh
            options += ["--deepspeed_multinode_launcher", "standard"]
    local = _share(processes, machines.count)
    argv = [sys.executable, "-m", LAUNCHERS["accelerate"], *options, *script]
    return argv, _environment(processes, local, threads) | asked


def _words(launch: str, nproc: int | None, machines: Machines) -> dict[str, str]:
    """How the stage was started, for run.json: its own command line does not say it. Nothing where nobody chose anything."""
    words = [] if launch in ("auto", "cpu") else ["--launch", launch]
    words += ["--nproc", str(nproc)] if nproc and nproc > 1 else []
    if machines.count > 1:
        words += ["--num-machines", str(machines.count), "--machine-rank", str(machines.rank)]
        words += ["--main-address", f"{machines.address}:{machines.port}"]
    return {LAUNCH: shlex.join(words)} if words else {}


def machines_of(launch: str, asked: Machines | None) -> Machines:
    """The machines of a run: those the command line names, or else those of the launch file.

    Raises:
        UsageError: the launch file has several machines and no address of the first.
    """
    if asked is not None or launch in ("auto", "cpu"):
        return asked or ONE_MACHINE
    file = find_launch_file(launch)
    settings = read_launch_file(file, 1)
    if settings.num_machines == 1:
        return ONE_MACHINE
    if not settings.main_process_ip:
        raise UsageError(
            f"{file}: {settings.num_machines} machines and no main_process_ip: set it and machine_rank there, "
            "or give --num-machines, --machine-rank and --main-address"
        )
    place = settings.machine_rank or 0, settings.main_process_ip, settings.main_process_port or PORT
    return Machines(settings.num_machines, *place)


def engine_of(launch: str) -> Engine:
    """The engine that a launch file names; all others are plain processes."""
    if launch in ("auto", "cpu"):
        return Engine("ddp", 0)
    file = find_launch_file(launch)
    return read_launch_file(file, 1).engine(file)


def printable(argv: list[str], env: dict[str, str]) -> str:
    """The command as it can be pasted into a shell."""
    return " ".join([f"{name}={shlex.quote(value)}" for name, value in env.items()] + [shlex.join(argv)])


def run(argv: list[str], env: dict[str, str], run_dir: Path | None, stdout: int | None = None) -> int:
    """Run the command to its end and return its exit code, the stage's own where the launcher replaced it.

    The first SIGTERM or SIGINT is passed on: the stage saves and stops. The second kills it. A status that a killed
    stage left at `running` becomes `failed` (or `preempted`, where a signal of ours was the reason).

    Args:
        run_dir: where the stage writes status.json; None: nowhere.
        stdout: file descriptor the child's standard output goes to; None: to ours.
    """
    import psutil  # noqa: F401  # here, as the handler below may be called again while it imports

    before = _status_text(run_dir)
    relay = _Relay(argv[1:2] == ["-m"], begun=lambda: run_dir is None or _status_text(run_dir) != before)
    previous = {number: signal.signal(number, relay) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        code = relay.wait(subprocess.Popen(argv, env=os.environ | env, process_group=0, stdout=stdout))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code == 0 or run_dir is None:
        return code
    return _settle(run_dir, code, preempted=relay.received is not None, said_so=_status_text(run_dir) != before)


class _Relay:
    """A signal handler that passes the first signal on to the stage's processes and kills them on the second."""

    def __init__(self, launcher: bool, begun: Callable[[], bool]) -> None:
        self.launcher, self.begun = launcher, begun
        self.received: int | None = None
        self.child: subprocess.Popen[bytes] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        first, self.received = self.received is None, number
        if self.child is not None:
            self.send(number if first else signal.SIGKILL)

    def wait(self, child: subprocess.Popen[bytes]) -> int:
        self.child = child
        if self.received is not None:  # it came while the child was being started
            self.send(self.received)
        code = child.wait()
        if code != 0 and self.received is not None:
            return 128 + self.received
        return code if code >= 0 else 128 - code

    def send(self, number: int) -> None:
        import psutil

        assert self.child is not None
        if number == signal.SIGINT and not self.begun():
            number = signal.SIGTERM  # to a stage that still imports, Ctrl-C is a traceback
        try:
            child = psutil.Process(self.child.pid)
            family = child.children(recursive=True)
            # torchrun gives its processes 30 s after a signal and then kills them; a PPO iteration may take longer, so
            # the signal goes past it, to the stage. Before there are any, the launcher is all there is to stop.
            ranks = child.children() if self.launcher else []
            targets = [child, *family] if number == signal.SIGKILL else ranks or [child]
        except psutil.NoSuchProcess:
            return
        for process in targets:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue


def _settle(run_dir: Path, code: int, preempted: bool, said_so: bool) -> int:
    status = read_status(run_dir)
    if status is None:
        return code
    if said_so and status["exit_code"]:
        return status["exit_code"]
    if status["state"] == "running":
        try:
            check_unlocked(run_dir)
        except Locked:  # the status is that of another run, still going on
            return code
        write_status(run_dir, "preempted" if preempted else "failed", f"{_reason(code)}; {_newest(run_dir)}", code)
    return code


def _reason(code: int) -> str:
    if code == 128 + signal.SIGKILL:
        return "killed by SIGKILL; if nobody did that, the kernel did, for want of memory"
    if code > 128:
        return f"stopped by {signal.Signals(code - 128).name} before the step at hand could be saved"
    return f"ended with exit code {code} without saying why; see its output"


def _newest(run_dir: Path) -> str:
    steps = [int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*") if path.suffix == ""]
    return f"the newest checkpoint is step-{max(steps)}" if steps else "there is no checkpoint yet"


def _status_text(run_dir: Path | None) -> str:
    file = run_dir / STATUS if run_dir else None
    return file.read_text(encoding="utf-8") if file and file.is_file() else ""


def _share(processes: int, machines: int) -> int:
    """Processes on each machine."""
    if processes % machines:
        below, above = processes // machines * machines, (processes // machines + 1) * machines
        legal = f"{below} or {above}" if below else str(above)
        raise UsageError(f"--nproc: {processes} processes do not divide among {machines} machines; expected {legal}")
    return processes // machines


def _on_cpu(script: list[str], local: int, machines: Machines) -> list[str]:
    if local == machines.count == 1:
        return [sys.executable, *script]
    address, port = (machines.address, machines.port) if machines.count > 1 else ("127.0.0.1", _free_port())
    place = ["--nnodes", str(machines.count), "--node_rank", str(machines.rank)]
    place += ["--master_addr", address, "--master_port", str(port)]
    return [sys.executable, "-m", LAUNCHERS["torchrun"], "--nproc_per_node", str(local), *place, *script]


def _environment(processes: int, local: int, threads: int) -> dict[str, str]:
    """`local`: how many of the processes are on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(threads or os.environ.get("OMP_NUM_THREADS") or max(1, cores // local)),
        # Threads that spin while they wait take the cores from those that work.
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        # A launcher that starts fewer processes than it was asked for says nothing; the stage compares.
        "RLHF_EXPECTED_WORLD_SIZE": str(processes),
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
