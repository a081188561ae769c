"""The fixtures of worlds.py; tests/stages has the same."""

from __future__ import annotations

from worlds import llamas, reward, world

__all__ = ["llamas", "reward", "world"]
