"""How a stage script starts and ends: flags in, exit code out. A mistake of the user is one message, never a traceback."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

import torch

from rlhf.config.parse import Invocation, parse
from rlhf.errors import OutOfMemory, RlhfError


def run_stage(stage: str, main: Callable[[Invocation], None]) -> None:
    """Parses the command line, runs `main` and exits with the code errors.py lists."""
    try:
        main(parse(stage, sys.argv[1:]))
    except RlhfError as error:
        print(f"rlhf: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except torch.OutOfMemoryError as error:
        print(
            f"rlhf: error: out of memory: {error}\nlower micro_batch_size, or set gradient_checkpointing: true",
            file=sys.stderr,
        )
        sys.exit(OutOfMemory.exit_code)
    except Exception:  # our own bug: the only traceback a user sees, with the code that says so
        traceback.print_exc()
        sys.exit(70)
