"""`rlhf eval`: how good a model is on held-out rows."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("eval", argv)

    from rlhf.training.evaluation.command import evaluate

    return evaluate(invocation)
