"""`rlhf chat`: a line is a message, the policy answers; on a terminal, or piped. Left out: messages of several lines."""

from __future__ import annotations

import json
import sys
import unicodedata
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from io import TextIOWrapper
from typing import Any

import torch
from transformers import TextStreamer

from rlhf.config.commands import ChatConfig
from rlhf.config.parse import Invocation
from rlhf.data.templates import Messages
from rlhf.errors import ConfigError, DataError
from rlhf.models.precision import precisions
from rlhf.report.console import Console
from rlhf.rollout.decoding import Reply
from rlhf.training.inference import Generated, load_actor

HELP = (
    "/reset begins anew, /system TEXT says who the model is and begins anew, /quit (or the end of input) ends, "
    "a message that begins with / is written with //"
)


def chat(invocation: Invocation[ChatConfig]) -> int:
    """Answers every line until the input ends.

    On a terminal a message that cannot be answered is told and left out, and Ctrl-C ends a reply; in a pipe each ends the
    command, as does a line that begins with / and is no command: else replies would no longer stand beside messages.
    """
    config, console, at_terminal = invocation.config, Console("chat", speak=True), sys.stdin.isatty()
    conversation = Conversation(config, console.note)
    for line in lines(at_terminal):
        word, _, rest = line.partition(" ")
        if word == "/quit":
            break
        if word.startswith("//"):
            line = line[1:]
        elif word.startswith("/"):
            if not conversation.told(word, rest.strip()):
                if not at_terminal:
                    raise DataError(f"standard input: {line[:60]!r} is no command, and was not answered; {HELP}")
                console.note(f"{word}: no such command; {HELP}")
            continue
        roles = conversation.policy.roles
        streamer = None if invocation.as_json else Streamer(roles.tokenizer, roles.stop_ids)
        try:
            reply = conversation.answer(line, streamer and streamer.told)
        except KeyboardInterrupt:
            if not at_terminal:
                raise
            print(flush=True)
            console.note("stopped: neither the message nor the reply is kept")
            continue
        except DataError as error:
            if not at_terminal:
                raise
            console.note(f"{error}; the message is left out; {HELP}")
            continue
        if streamer is None:
            print(json.dumps({"response": reply.text, "finished": reply.finished}, ensure_ascii=False), flush=True)
            continue
        streamer.end()
        if not reply.finished:
            console.note(f"the reply was cut at max_new_tokens {config.max_new_tokens}")
    return 0


class Conversation:
    """What was said, and the policy that goes on with it."""

    def __init__(self, config: ChatConfig, note: Callable[[str], None]) -> None:
        self.config, self.note, self.system, self.turn = config, note, config.system, 0
        self.policy = load_actor(config.model, template=config.template, trust_remote_code=config.trust_remote_code)
        self.precision = precisions(config)[0]
        self.messages: Messages = []
        if self.policy.template.chat:
            note(HELP)
        elif config.system is not None:
            raise ConfigError(f"system: {config.model} has no chat template to put it in; leave it out")
        else:
            note("without a chat template each line is text to go on with, and what came before it is not seen")

    def answer(self, line: str, told: Callable[[Reply], None] | None) -> Generated:
        """The reply to one more message; it is remembered if there is a chat template."""
        said: Messages = [*self._opening(), *self.messages, {"role": "user", "content": line}]
        ids = self.policy.template.prompt(said if self.policy.template.chat else line, "the conversation")
        note = self.note if self.turn == 0 else lambda _: None
        (reply,) = self.policy.replies([ids], [self.turn], self.config, precision=self.precision, note=note, told=told)
        self.turn += 1
        self.messages += [said[-1], {"role": "assistant", "content": reply.text}]
        return reply

    def told(self, word: str, rest: str) -> bool:
        """A line that is no message; whether it is a command."""
        if word == "/reset" and not rest:
            self.messages = []
            self.note("begun anew")
        elif word == "/system" and self.policy.template.chat:
            self.messages, self.system = [], rest or None
            self.note(f"begun anew, with the system message: {rest}" if rest else "begun anew, without a system message")
        elif word == "/system":
            self.note("there is no chat template to put a system message in")
        else:
            return False
        return True

    def _opening(self) -> Messages:
        return [{"role": "system", "content": self.system}] if self.system is not None else []


class Streamer(TextStreamer):
    """Prints a reply word by word, without what a terminal would obey: control characters but line breaks and tabs."""

    def __init__(self, tokenizer: Any, stop_ids: Collection[int]) -> None:
        super().__init__(tokenizer, skip_special_tokens=True)
        self.stop_ids = stop_ids

    def told(self, reply: Reply) -> None:
        if reply.tokens[-1] not in self.stop_ids:  # which may be a word
            self.put(torch.tensor(reply.tokens[-1:]))

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        super().on_finalized_text(
            "".join(one for one in text if one in "\n\t" or unicodedata.category(one) != "Cc"), stream_end
        )


def lines(at_terminal: bool) -> Iterator[str]:
    """What is typed, blank lines left out.

    Raises:
        DataError: it is not text.
    """
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 (input() then edits, and remembers, lines)
    elif isinstance(sys.stdin, TextIOWrapper):  # in a C locale Python lets what is no UTF-8 pass, as surrogates
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
    while True:
        try:
            line = input("> " if at_terminal else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise DataError(f"standard input: invalid UTF-8 byte 0x{error.object[error.start]:02x}; expected text") from None
        if line.strip():
            yield line.strip()
