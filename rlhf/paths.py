"""Where the recipes and their configs lie: inside the package once installed, beside it in a checkout."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
STAGES = next(path for path in (PACKAGE / "_stages", PACKAGE.parent / "stages") if path.is_dir())
CONFIGS = next(path for path in (PACKAGE / "_configs", PACKAGE.parent / "configs") if path.is_dir())
