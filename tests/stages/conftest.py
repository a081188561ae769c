"""The fixtures of worlds.py; tests/faults has the same."""

from __future__ import annotations

from worlds import chatty, llamas, models, reward, world

__all__ = ["chatty", "llamas", "models", "reward", "world"]
