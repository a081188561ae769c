"""`rlhf fp8`: what FP8 does to a model."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    from rlhf.training.fp8 import words

    return words.run(argv)
