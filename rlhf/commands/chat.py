"""`rlhf chat`: talk to a policy."""

from __future__ import annotations


def run(argv: list[str]) -> int:
    from rlhf.config.parse import parse

    invocation = parse("chat", argv)  # before the seconds that importing torch takes

    from rlhf.training.chat_command import chat

    return chat(invocation)
