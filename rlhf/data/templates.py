"""From normalised rows (rows.py) to token ids: chat templates, one BOS, responses that end at EOS.

Text is rendered first and cut into prompt and response second, so a template is never asked for a piece it did not write.
Every response ends with an end-of-sequence token: that is the position a reward model is read at and the token that stops a
rollout. What a template writes after it (SmolLM2 adds a line break) is left out, or the two would not agree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf.digest import text_digest
from rlhf.errors import DataError

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Segment:
    """A run of tokens, trained on or not."""

    ids: list[int]
    trained: bool


class Template:
    """Renders rows with a tokenizer. `mode` is `chat`, `plain` or `auto` (chat where the tokenizer has a chat template)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mode: str, stop_ids: list[int]) -> None:
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if mode == "chat" and not has_template:
            raise DataError("data.template is `chat`, but the tokenizer has no chat template; use `plain` or add one")
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.chat = has_template if mode == "auto" else mode == "chat"

    def prompt(self, prompt: str | Messages, where: str) -> list[int]:
        """Token ids of a prompt, ready for a reply to follow."""
        if not self.chat:
            return self.tokenizer(self._plain(prompt, where))["input_ids"]
        return self._ids(self._render(as_messages(prompt), where, add_generation_prompt=True))

    def response(self, prompt: str | Messages, response: str | Messages, where: str) -> tuple[list[int], list[int]]:
        """(prompt ids, response ids ending with EOS) of one turn."""
        if not self.chat:
            return self.prompt(prompt, where), self._closed(self._ids(self._plain(response, where)))
        messages = as_messages(prompt)
        reply = [{"role": "assistant", "content": response}] if isinstance(response, str) else response
        head = self._render(messages, where, add_generation_prompt=True)
        return self._ids(head), self._closed(self._ids(self._tail(head, self._render(messages + reply, where), where)))

    def conversation(self, messages: Messages, where: str) -> list[Segment]:
        """All turns, the assistant's trained; each of them ends with EOS."""
        if not self.chat:
            raise DataError(f"{where}: a row of messages needs a chat template, and data.template is plain here")
        segments, done = [], ""
        for turn, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            head = self._render(messages[:turn], where, add_generation_prompt=True)
            full = self._render(messages[: turn + 1], where)
            segments.append(Segment(self._ids(self._tail(done, head, where)), trained=False))
            reply = self._ids(self._tail(head, full, where))
            closed = self._closed(reply)
            segments.append(Segment(closed, trained=True))
            segments.append(Segment(reply[len(closed) :], trained=False))
            done = full
        if not segments:
            raise DataError(f"{where}: no assistant message to learn from")
        return [segment for segment in segments[:-1] if segment.ids]

    def text(self, text: str) -> list[int]:
        """All of a plain text, with the tokenizer's own BOS if it has one, and EOS at the end, also where it holds others."""
        ids = self.tokenizer(text, verbose=False)["input_ids"]  # verbose warns of a text longer than the model, which is split
        return ids if ids and ids[-1] in self.stop_ids else ids + self.stop_ids[:1]

    def _closed(self, ids: list[int]) -> list[int]:
        for index in reversed(range(len(ids))):
            if ids[index] in self.stop_ids:
                return ids[: index + 1]
        return ids + self.stop_ids[:1]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _render(self, messages: Messages, where: str, **options: Any) -> str:
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, **options)  # pyright: ignore[reportReturnType]
        except Exception as error:  # templates are foreign jinja and raise what they like
            raise DataError(f"{where}: the tokenizer's chat template does not take these messages: {error}") from error

    @staticmethod
    def _tail(head: str, full: str, where: str) -> str:
        if not full.startswith(head):
            raise DataError(
                f"{where}: the chat template rewrites earlier turns when a reply is added, "
                "so prompt and reply cannot be told apart; use a template whose output only grows"
            )
        return full[len(head) :]

    @staticmethod
    def _plain(value: str | Messages, where: str) -> str:
        if isinstance(value, str):
            return value
        raise DataError(f"{where}: this row holds messages, and there is no chat template to render them (data.template)")


def as_messages(prompt: str | Messages) -> Messages:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def plain_prompt(prompt: str | Messages) -> str:
    """The words of the user: the last user message of a chat, or the text itself."""
    return prompt if isinstance(prompt, str) else next(m["content"] for m in reversed(prompt) if m["role"] == "user")


TOKENIZER = ("tokenizer", "template")
"""Names of `tokenizer_digests`."""


def tokenizer_digests(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Fingerprints that must agree between stages: of the vocabulary with its special ids, and of the chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else str(sorted(tokenizer.get_vocab().items()))
    special = str((tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id))
    return {
        "tokenizer": text_digest(vocabulary + special),
        "template": text_digest(str(getattr(tokenizer, "chat_template", None))),
    }
