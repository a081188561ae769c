"""What a row of training data must hold: its columns under our names, and the shape of each kind of row.

The shapes are described in rows.py, the reader they serve. Left out: files and places; what is wrong here is a
`BadRow`, which does not know where it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Literal, TypeGuard

from rlhf.data.conversations import (
    EMPTY_FIX,
    BadRow,
    Message,
    check_number,
    check_prompt,
    check_reply,
    check_text,
    describe,
    is_sharegpt,
    is_transcript,
    read_messages,
    read_transcript,
    read_transcript_reply,
    split_common_prompt,
)
from rlhf.data.kinds import ALIASES, FIELDS, Kind, stages_of
from rlhf.errors import ConfigError

ExtraColumns = Literal["fail", "ignore"]
Dialogue = str | list[Message]

SHAREGPT = "ShareGPT turns were read as messages"
ALPACA = "Alpaca's instruction, input and output were read as prompt and completion"
TRANSCRIPT = "hh-rlhf transcripts were read as messages"
SPLIT = "The prompt was split off where chosen and rejected part"
EQUAL_PAIR = "The pair was dropped because chosen equals rejected"


class Missing(BadRow):
    """A row lacks a column it needs."""


@dataclass(frozen=True)
class Fields:
    """The known columns of one row under our names; errors speak of the file's. `remarks` tell what was changed."""

    values: dict[str, Any]
    columns: dict[str, str]  # our field -> the file's column, also for fields the row lacks
    kind: Kind
    remarks: set[str]
    given: tuple[str, ...] = ()
    """The file's columns of the row, known or not."""
    unread: tuple[str, ...] = ()
    """Those of them that are no field and that nobody asked for."""
    may_be_empty: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def require(self, name: str) -> Any:
        if name not in self.values:
            others = [column for column in self.given if column not in self.columns.values()]
            hint = f"; is it one of them? --data.columns.{name} {others[0]}" if others else ""
            if stages := stages_of(self.given, self.columns, self.kind):
                hint = f": these are rows for {stages}"
            raise Missing(f"{self.columns[name]} is missing", f"the row has {', '.join(self.given) or 'no column'}{hint}")
        return self.values[name]

    def text(self, name: str) -> str:
        text = check_text(self.require(name), self.columns[name])
        if not text.strip() and name not in self.may_be_empty:
            raise BadRow(f"{self.columns[name]} is empty", EMPTY_FIX)
        return text

    def dialogue(self, name: str) -> Dialogue:
        """A string as it is, or messages in whichever spelling."""
        value = self.require(name)
        if isinstance(value, str):
            text = self.text(name)
            if not is_transcript(text):
                return text
            self.remarks.add(TRANSCRIPT)
            return read_transcript(text)
        turns = [value] if isinstance(value, dict) else value  # ShareGPT pairs give each reply as one bare turn
        if not isinstance(turns, list):
            raise BadRow(f"{self.columns[name]} is {describe(value)}, expected a string or a list of messages")
        messages = read_messages(turns, self.columns[name])
        if is_sharegpt(turns):
            self.remarks.add(SHAREGPT)
        return messages

    def boolean(self, name: str) -> bool:
        value = self.require(name)
        if not isinstance(value, bool):
            raise BadRow(f"{self.columns[name]} is {describe(value)}, expected true or false")
        return value

    def messages(self, name: str) -> list[Message]:
        messages = self.dialogue(name)
        if isinstance(messages, str):
            raise BadRow(f"{self.columns[name]} is a string, expected a list of messages")
        return messages

    def prompt(self) -> Dialogue:
        prompt = self.dialogue("prompt")
        return prompt if isinstance(prompt, str) else check_prompt(prompt, self.columns["prompt"])

    def reply(self, name: str, prompt: Dialogue) -> Dialogue:
        """The reply to `prompt`, in the same form as `prompt`."""
        reply = self.dialogue(name)
        if isinstance(prompt, str):
            if isinstance(reply, str):
                return reply
            raise BadRow(f"{self.columns[name]} is messages, but the prompt is a string", "give both in the same form")
        if isinstance(reply, str):
            from_transcript = isinstance(self.values["prompt"], str)
            return read_transcript_reply(reply) if from_transcript else [{"role": "assistant", "content": reply}]
        return reply

    def replies(self, name: str, prompt: Dialogue) -> list[Dialogue]:
        """A list of at least two replies to `prompt`."""
        given = self.require(name)
        if not isinstance(given, list) or len(given) < 2:
            found = f"a list of {len(given)}" if isinstance(given, list) else describe(given)
            raise BadRow(f"{self.columns[name]} is {found}, expected a list of at least two replies")
        places = [f"{self.columns[name]}[{place}]" for place in range(len(given))]
        ones = [
            replace(self, values=self.values | {name: reply}, columns=self.columns | {name: place})
            for reply, place in zip(given, places, strict=True)
        ]
        return [one.check_reply(name, one.reply(name, prompt)) for one in ones]

    def numbers(self, name: str, count: int) -> list[float]:
        given = self.require(name)
        if not isinstance(given, list) or len(given) != count:
            found = f"a list of {len(given)}" if isinstance(given, list) else describe(given)
            raise BadRow(f"{self.columns[name]} is {found}, expected a list of {count} numbers, one a reply")
        return [check_number(value, f"{self.columns[name]}[{place}]") for place, value in enumerate(given)]

    def check_reply(self, name: str, reply: Dialogue) -> Dialogue:
        return reply if isinstance(reply, str) else check_reply(reply, self.columns[name])


@dataclass(frozen=True)
class Schema:
    """How the columns of one file map to the fields of a kind."""

    kind: Kind
    names: dict[str, str]  # the file's column -> our field, aliases included
    columns: dict[str, str]  # our field -> the file's column
    extra_columns: ExtraColumns
    asked: Mapping[str, str]  # a column that goes along as it is -> who asks for it

    @classmethod
    def of(
        cls,
        kind: Kind,
        columns: Mapping[str, str],
        json_key: str | None,
        extra_columns: ExtraColumns,
        asked: Mapping[str, str] = MappingProxyType({}),
    ) -> Schema:
        """Raises ConfigError where `columns` or `json_key` speak of a field the kind does not have."""
        if json_key is not None:
            if kind not in ("text", "sft"):
                raise ConfigError(f"data.json_key: names a column of plain text, which {kind} data does not have")
            kind, columns = "text", {**columns, "text": json_key}
        fields = FIELDS[kind]
        for name in columns:
            if name not in fields:
                known = f"expected one of {', '.join(fields)}"
                raise ConfigError(f"data.columns.{name}: no field of {kind} data{_nearest(name, fields)}; {known}")
        mapped = {column: name for name, column in columns.items()}
        if len(mapped) < len(columns):
            raise ConfigError("data.columns: two fields are read from one column; give each its own")
        unmapped = [name for name in fields if name not in columns]
        aliases = {alias: name for alias, name in ALIASES.items() if name in unmapped}
        if "messages" not in fields and "prompt" in unmapped:
            aliases["conversations"] = "prompt"  # LLaMA-Factory's pairs: turns that both replies follow
        names = aliases | {name: name for name in unmapped} | mapped  # what the user mapped comes last and holds
        return cls(kind, names, {name: columns.get(name, name) for name in fields}, extra_columns, asked)

    def others_of(self, value: dict[str, Any]) -> dict[str, Any]:
        """The columns that are no fields, and those that are asked for."""
        return {column: content for column, content in value.items() if column not in self.names or column in self.asked}

    def fields_of(self, value: Any) -> Fields:
        """The known columns of one record; unknown ones are an error unless they are to be ignored."""
        if not isinstance(value, dict):
            raise BadRow(f"expected an object, found {describe(value)}")
        alpaca = is_alpaca(value) and "prompt" in self.columns and "instruction" not in self.names
        for column, who in self.asked.items():
            if value.get(column) is None:
                lacks = "is null" if column in value else "is missing"
                raise BadRow(f"{column} {lacks}, which {who} asks for", f"the row has {', '.join(value)}")
        if alpaca:
            value = of_alpaca(value, self.names)
        extra = [column for column in self.others_of(value) if column not in self.asked]
        if extra and self.extra_columns == "fail":
            listed = ", ".join(f"{column!r}{_nearest(column, tuple(self.names))}" for column in extra)
            expected = f"expected {', '.join(self.columns.values())}"
            fix = f"{expected}: map them (--data.columns.FIELD {extra[0]}), or leave them (--data.extra_columns ignore)"
            unknown = f"unknown column{'s' if len(extra) > 1 else ''} {listed}"
            if missing := replace(self, extra_columns="ignore").missing_in(value):
                raise BadRow(f"{unknown}, and {missing.reason}", missing.fix)
            raise BadRow(unknown, fix)
        values: dict[str, Any] = {}
        columns = dict(self.columns)
        remarks = {f"Column {column!r} was not read" for column in extra} | ({ALPACA} if alpaca else set())
        for column, name in self.names.items():
            if column not in value:
                continue
            if name in values:
                raise BadRow(f"{columns[name]} and {column} both give the {name}", "keep one of them")
            values[name], columns[name] = value[column], column
            if column in ALIASES and column not in self.columns.values():
                remarks.add(f"Column {column!r} was read as {name!r}")
        return Fields(values, columns, self.kind, remarks, tuple(value), tuple(extra))

    def missing_in(self, value: dict[str, Any]) -> Missing | None:
        """What is said of the row where it lacks a column."""
        try:
            SHAPES[self.kind](self.fields_of(value))
        except Missing as missing:
            return missing
        except BadRow:
            pass
        return None


def is_alpaca(value: dict[str, Any]) -> bool:
    return isinstance(value.get("instruction"), str) and "prompt" not in value and "messages" not in value


def of_alpaca(value: dict[str, Any], mapped: Mapping[str, str]) -> dict[str, Any]:
    """Instruction and input on lines of their own, as LLaMA-Factory joins them; columns beside them stay, and an output that
    is `mapped` already."""
    value = dict(value)
    parts = [value.pop("instruction"), value.pop("input", None)]
    if "output" in value and "completion" not in value and "output" not in mapped:
        value["completion"] = value.pop("output")
    return {"prompt": "\n".join(part for part in parts if part), **value}


@lru_cache  # a file of a million rows asks the same a million times
def _nearest(name: str, known: tuple[str, ...]) -> str:
    close = get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _text(row: Fields) -> dict[str, Any]:
    return {"text": row.text("text")}


def _sft(row: Fields) -> dict[str, Any]:
    if ("messages" in row or "text" in row) and len(row.values) > 1:
        given = ", ".join(row.columns[name] for name in row.values)
        raise BadRow(f"{given} are all given", "a row holds messages, or prompt and completion, or text")
    if "text" in row:
        return _text(row)
    if "messages" in row:
        messages = row.messages("messages")
        if all(message["role"] != "assistant" for message in messages):
            raise BadRow(f"{row.columns['messages']} has no assistant message", "there is nothing to learn from")
        return {"messages": messages}
    prompt = row.prompt()
    return {"prompt": prompt, "completion": row.check_reply("completion", row.reply("completion", prompt))}


def _pair(row: Fields) -> dict[str, Any] | None:
    prompt, chosen, rejected = _parted(row)
    if chosen == rejected:
        row.remarks.add(EQUAL_PAIR)
        return None
    return _checked(row, prompt, chosen, rejected)


def _reply(row: Fields) -> dict[str, Any]:
    return _sft(replace(row, may_be_empty=("completion",)))


def _replies(row: Fields) -> dict[str, Any]:
    prompt, chosen, rejected = _parted(replace(row, may_be_empty=("chosen", "rejected")))
    if chosen == rejected == []:  # of two conversations that are the same, all was taken for their prompt
        prompt, chosen, rejected = prompt[:-1], prompt[-1:], prompt[-1:]
    return _checked(row, prompt, chosen, rejected)


def _parted(row: Fields) -> tuple[Dialogue, Dialogue, Dialogue]:
    """(prompt, chosen, rejected)"""
    chosen, rejected = row.dialogue("chosen"), row.dialogue("rejected")
    if _is_conversation(chosen) and _is_conversation(rejected):
        return _split_pair(row, chosen, rejected)
    prompt = row.prompt()
    return prompt, row.reply("chosen", prompt), row.reply("rejected", prompt)


def _checked(row: Fields, prompt: Dialogue, chosen: Dialogue, rejected: Dialogue) -> dict[str, Any]:
    return {
        "prompt": prompt,
        "chosen": row.check_reply("chosen", chosen),
        "rejected": row.check_reply("rejected", rejected),
    }


def _ranking(row: Fields) -> dict[str, Any] | None:
    """Replies with a rank each (lower is better, equal is a tie), whether two are given or more."""
    others = ("chosen", "rejected", "margin", "tie") if "responses" in row else ("scores", "ranks")
    if surplus := [row.columns[name] for name in others if name in row]:
        given = row.columns["responses" if "responses" in row else "chosen"]
        fix = "a row holds chosen, rejected and perhaps margin or tie, or responses and perhaps scores or ranks"
        raise BadRow(f"{', '.join(surplus)} does not go with {given}", fix)
    if "responses" not in row:
        return _ranked_pair(row)
    prompt = row.prompt()
    responses = row.replies("responses", prompt)
    if "scores" in row and "ranks" in row:
        raise BadRow(f"{row.columns['scores']} and {row.columns['ranks']} both give the order", "keep one of them")
    if "scores" in row:
        ranks = [-score for score in row.numbers("scores", len(responses))]
    else:
        ranks = row.numbers("ranks", len(responses)) if "ranks" in row else list(map(float, range(len(responses))))
    return {"prompt": prompt, "responses": responses, "ranks": ranks, "margin": 0.0}


def _ranked_pair(row: Fields) -> dict[str, Any] | None:
    margin = check_number(row.values.get("margin", 0.0), row.columns["margin"])
    tie = row.values.get("tie", False)
    if not isinstance(tie, bool):
        raise BadRow(f"{row.columns['tie']} is {describe(tie)}, expected true or false")
    if margin < 0 or (tie and margin):
        raise BadRow(f"{row.columns['margin']} is {margin:g}, expected 0 or more" + (", and 0 for a tie" if tie else ""))
    pair = _pair(row)
    if pair is None:
        return None
    ranks = [0.0, 0.0 if tie else 1.0]
    return {"prompt": pair["prompt"], "responses": [pair["chosen"], pair["rejected"]], "ranks": ranks, "margin": margin}


def _rated(row: Fields) -> dict[str, Any] | None:
    if "chosen" in row or "rejected" in row:
        if "completion" in row or "label" in row:
            given = ", ".join(row.columns[name] for name in row.values)
            raise BadRow(f"{given} are all given", "a row holds completion and label, or chosen and rejected")
        return _pair(row)
    prompt, label = row.prompt(), row.boolean("label")
    return {"prompt": prompt, "completion": row.check_reply("completion", row.reply("completion", prompt)), "label": label}


def _split_pair(
    row: Fields, chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """(prompt, chosen reply, rejected reply); a prompt column that stands beside them must say the same."""
    prompt, chosen, rejected = split_common_prompt(chosen, rejected)
    if chosen != rejected:  # else the pair is dropped, and all of it looks like its prompt
        row.remarks.add(SPLIT)
        check_prompt(prompt, f"the common beginning of {row.columns['chosen']} and {row.columns['rejected']}")
        if "prompt" in row and row.dialogue("prompt") not in (prompt, prompt[-1]["content"]):
            raise BadRow(f"{row.columns['prompt']} is not what chosen and rejected have in common")
    return prompt, chosen, rejected


def _is_conversation(dialogue: Dialogue) -> TypeGuard[list[Message]]:
    """Whether it begins before the reply, so that the prompt is part of it."""
    return not isinstance(dialogue, str) and dialogue[0]["role"] != "assistant"


def _prompt(row: Fields) -> dict[str, Any]:
    if "prompt" in row:
        return {"prompt": row.prompt()}
    name = next((name for name in ("messages", "chosen") if name in row), "prompt")
    messages = list(row.messages(name))
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    return {"prompt": check_prompt(messages, row.columns[name])}


# A row in its shape, None where it is of no use though nothing is wrong with it.
SHAPES: dict[Kind, Callable[[Fields], dict[str, Any] | None]] = {
    "text": _text,
    "sft": _sft,
    "pair": _pair,
    "ranking": _ranking,
    "rated": _rated,
    "prompt": _prompt,
    "reply": _reply,
    "replies": _replies,
}
