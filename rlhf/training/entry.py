"""How a stage script starts and ends: flags in, exit code out. A mistake of the user is one message, never a traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

from rlhf.config.parse import Invocation, parse
from rlhf.errors import OutOfMemory, RlhfError, UsageError, without_secrets


def run_stage(stage: str, main: Callable[[Invocation], None]) -> None:
    """Parses the command line, runs `main` and exits with the code errors.py lists."""
    try:
        invocation = parse(stage, sys.argv[1:])
        if invocation.dry_run or invocation.launch != "auto" or invocation.nproc or invocation.machines:
            raise UsageError(
                f"--dry-run and the flags that say what to launch are for `rlhf {stage}`, which starts this script"
            )
        main(invocation)
    except RlhfError as error:
        print(f"rlhf: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except Exception as error:
        if full := OutOfMemory.behind(error, "before training began: use a machine with more, or a smaller model"):
            print(f"rlhf: error: {full}", file=sys.stderr)
            sys.exit(full.exit_code)
        # our own bug: the only traceback a user sees, with the code that says so
        print(without_secrets(traceback.format_exc()), file=sys.stderr)
        sys.exit(70)
