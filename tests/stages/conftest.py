"""The fixtures of worlds.py; tests/faults has the same."""

from __future__ import annotations

from worlds import llamas, models, reward, world

__all__ = ["llamas", "models", "reward", "world"]
