"""`rlhf generate`: replies of a policy to the prompts of a file."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("generate", argv)  # before the seconds that importing torch takes

    from rlhf.training.generate_command import generate

    return generate(invocation)
