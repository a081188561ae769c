"""`python -m rlhf` is the command `rlhf`, for environments whose scripts are not on the PATH."""

from __future__ import annotations

import sys

from rlhf.cli import main

if __name__ == "__main__":
    sys.exit(main())
