"""Conversations as training files write them, brought into one form: lists of {"role", "content"} messages.

Three spellings are read: messages (OpenAI, TRL), ShareGPT turns ({"from", "value"}) and hh-rlhf transcripts, one string
of "\\n\\nHuman: ..." and "\\n\\nAssistant: ..." in turn.
Left out: tool calls, images, and the chat template that turns messages into text (templates.py).
"""

from __future__ import annotations

import re
from typing import Any

Message = dict[str, str]

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SPEAKERS = {"Human": "user", "Assistant": "assistant"}  # hh-rlhf, https://github.com/anthropics/hh-rlhf
JSON_NAMES = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
EMPTY_FIX = "expected some text; data.on_error: skip leaves such rows out"
LARGEST_NUMBER = (2 - 2**-23) * 2.0**127
"""Of float32 (IEEE 754)."""
TURN = re.compile(r"\n\n(Human|Assistant):")


class BadRow(Exception):
    """One row of a data file cannot be used; `reason` names the field, `fix` is what its author can do."""

    def __init__(self, reason: str, fix: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.fix = fix


def check_text(value: Any, name: str) -> str:
    """`value` if it is a string that can be encoded."""
    if not isinstance(value, str):
        raise BadRow(f"{name} is {describe(value)}, expected a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        lone = value[error.start]
        raise BadRow(f"{name} holds the lone surrogate {lone!r}", "write the character as UTF-8") from None
    return value


def check_number(value: Any, name: str) -> float:
    """`value` as a float if it is a finite number; true and false are none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is {describe(value)}, expected a number")
    if not abs(value) <= LARGEST_NUMBER:
        raise BadRow(f"{name} is {value!r:.40}, expected a number that float32 holds")
    return float(value)


def describe(value: Any) -> str:
    """What JSON calls the type of `value`."""
    return "null" if value is None else JSON_NAMES.get(type(value), type(value).__name__)


def read_messages(turns: list[Any], name: str) -> list[Message]:
    """Messages checked one by one; ShareGPT turns are renamed."""
    if not turns:
        raise BadRow(f"{name} is an empty list, expected at least one message")
    return [_read_message(turn, f"{name}[{index}]") for index, turn in enumerate(turns)]


def is_sharegpt(turns: list[Any]) -> bool:
    """Whether the turns are written {"from", "value"}; the first one tells."""
    return isinstance(turns[0], dict) and "from" in turns[0]


def _read_message(turn: Any, name: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{name} is {describe(turn)}, expected an object with role and content")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    for key in (role_key, content_key):
        if key not in turn:
            raise BadRow(f"{name} has no '{key}'", "a message is an object with role and content")
    if surplus := sorted(set(turn) - {role_key, content_key}):
        raise BadRow(f"{name} has the unknown key {surplus[0]!r}", "a message holds role and content only")
    roles = SHAREGPT_ROLES if role_key == "from" else {role: role for role in ROLES}
    role = check_text(turn[role_key], f"{name}.{role_key}")
    if role not in roles:
        raise BadRow(f"{name}.{role_key} is {role!r}", f"expected one of {', '.join(roles)}")
    content = check_text(turn[content_key], f"{name}.{content_key}")
    if roles[role] == "assistant" and not content.strip():
        raise BadRow(f"{name}.{content_key} is an empty assistant message", EMPTY_FIX)
    return {"role": roles[role], "content": content}


def is_transcript(text: str) -> bool:
    """Whether a string is an hh-rlhf transcript; they all begin with this marker."""
    return text.startswith("\n\nHuman:")


def read_transcript(text: str) -> list[Message]:
    """An hh-rlhf transcript as messages, each stripped of white space; an open last "Assistant:" is no message."""
    _, *parts = TURN.split(text)
    messages = [
        {"role": SPEAKERS[speaker], "content": content.strip()}
        for speaker, content in zip(parts[::2], parts[1::2], strict=True)
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()
    return messages


def read_transcript_reply(text: str) -> list[Message]:
    """What stands after the open "Assistant:" of a transcript."""
    return read_transcript("\n\nAssistant:" + text)


def split_common_prompt(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen reply, rejected reply) of two conversations: TRL's implicit prompt, the messages they share."""
    shared = 0
    while chosen[shared : shared + 1] == rejected[shared : shared + 1] != []:
        shared += 1
    return chosen[:shared], chosen[shared:], rejected[shared:]


def check_prompt(messages: list[Message], name: str) -> list[Message]:
    """`messages` if they can be answered: they end with the turn that asks."""
    if not messages:
        raise BadRow(f"{name} is empty", "expected at least one message to answer")
    if messages[-1]["role"] == "assistant":
        raise BadRow(f"{name} ends with an assistant message", "a prompt ends with the message to answer")
    if not any(message["role"] == "user" and message["content"].strip() for message in messages):
        raise BadRow(f"{name} has no user message with words in it", "expected a question or a task")
    return messages


def check_reply(messages: list[Message], name: str) -> list[Message]:
    """`messages` if they can be learned from: an assistant's turn, and nothing open behind it."""
    if not messages:
        raise BadRow(f"{name} is an empty reply", EMPTY_FIX)
    if messages[0]["role"] != "assistant" or messages[-1]["role"] != "assistant":
        raise BadRow(f"{name} is not a reply", "it must begin and end with an assistant message")
    return messages
