"""`rlhf score`: what a reward gives the replies of a file."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("score", argv)

    from rlhf.training.score_command import score

    return score(invocation)
