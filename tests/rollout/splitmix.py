"""The random numbers of a row, on Python's integers."""

from __future__ import annotations


def splitmix64(seed: int, place: int) -> int:
    """The reference algorithm (Steele, Lea and Flood 2014)."""
    z = (seed + (place + 1) * 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)
