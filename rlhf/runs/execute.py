"""One stage from the outside: check what can be checked without torch, say what is about to happen, run it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from rlhf.config.engines import require_packages
from rlhf.config.parse import Invocation
from rlhf.runs import launch
from rlhf.runs.dry_run import batches, require_together
from rlhf.runs.inputs import require_inputs, require_rows
from rlhf.runs.lineage import state_of
from rlhf.runs.lock import check_output, check_unlocked
from rlhf.runs.manifest import read_status, say_done
from rlhf.runs.outcome import next_command, outcome

STDERR = 2  # the file descriptor


def execute(invocation: Invocation, quiet: bool = False, alone: bool = True) -> int:
    """Run a stage, unless its run is done already, and return its exit code.

    Args:
        quiet: keep standard output clear; what would go there goes to standard error.
        alone: nothing follows by itself, so that the user is told what to do next.

    Raises:
        ConfigError: launch file, config and rows do not go together.
        OutputError: the output directory cannot be made or written.
        Locked: another run is writing there.
        DataError: as `lineage.state_of`.
    """
    stage, config = invocation.stage, invocation.config
    log = sys.stderr if quiet else sys.stdout
    how = stage, invocation.launch, invocation.nproc, invocation.arguments, config.threads
    machines = launch.machines_of(invocation.launch, invocation.machines)
    argv, env = launch.command(*how, machines)
    require_together(invocation)
    require_packages(config, launch.engine_of(invocation.launch))
    if invocation.unit_test:
        print(launch.printable(argv, env), file=sys.stderr, flush=True)
        return launch.run(argv, env, None)
    run = Path(config.output)
    keeps_books = machines.rank == 0  # lock and status are machine 0's; what is refused there is refused on all
    check_output(run)
    if keeps_books:
        check_unlocked(run)
    require_inputs(invocation)
    world_size = int(env["RLHF_EXPECTED_WORLD_SIZE"])
    machine = {"world_size": world_size, "threads": int(env["OMP_NUM_THREADS"])}
    state = state_of(run, stage, config, machine, invocation.resume.allow_inexact)
    if state == "done":
        if keeps_books:
            say_done(run)
        print(f"{stage}: done, kept: {run}", file=log, flush=True)
        return 0
    require_rows(invocation)
    beginning = "going on with" if state == "resume" else "starting"
    print(f"{stage}: {beginning if keeps_books else 'joins'} {run}", file=log)
    for line in batches(config, world_size):
        print(f"{stage}: {line}", file=log)
    print(launch.printable(argv, env), file=log, flush=True)
    code = launch.run(argv, env, run if keeps_books else None, stdout=STDERR if quiet else None)
    if not keeps_books:  # a launcher's code says less than what machine 0, or whoever failed first, has written
        told = read_status(run) if code else None
        return told["exit_code"] or code if told else code
    status = read_status(run)
    if status and status["pid"] == os.getpid():  # the stage could not say it itself
        print(f"rlhf: {stage}: {status['reason']}", file=sys.stderr)
    if not code:
        print(f"{stage}: {outcome(run)}", file=log, flush=True)
        if alone:
            print(f"{stage}: next: {next_command(invocation)}", file=log, flush=True)
    return code
