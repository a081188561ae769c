"""The kinds of rows: the fields of each, and what columns tell of the stage that a row is for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal

Kind = Literal["text", "sft", "pair", "ranking", "rated", "prompt", "reply", "replies"]

FIELDS: dict[Kind, tuple[str, ...]] = {
    "text": ("text",),
    "sft": ("messages", "prompt", "completion", "text"),
    "pair": ("prompt", "chosen", "rejected"),
    "ranking": ("prompt", "chosen", "rejected", "margin", "tie", "responses", "scores", "ranks"),
    "rated": ("prompt", "completion", "label", "chosen", "rejected"),
    "prompt": ("prompt", "messages", "completion", "chosen", "rejected"),
    "reply": ("messages", "prompt", "completion", "text"),
    "replies": ("prompt", "chosen", "rejected"),
}
# conversations is ShareGPT's name, which trl.maybe_convert_to_chatml renames too; choosen is a misspelling in the wild.
ALIASES = {"response": "completion", "choosen": "chosen", "conversations": "messages"}

SIGNS: tuple[tuple[frozenset[str], tuple[Kind, ...], str], ...] = (
    (frozenset({"chosen", "rejected"}), ("ranking", "pair", "rated", "prompt"), "rlhf rm or dpo"),
    (frozenset({"prompt", "responses"}), ("ranking", "prompt"), "rlhf rm"),
    (frozenset({"prompt", "completion", "label"}), ("rated", "prompt"), "rlhf kto"),
    (frozenset({"messages"}), ("sft", "prompt"), "rlhf sft"),
)
"""Columns that tell what a row is for, the kinds it can be read as, and the stages to name."""
WHOLE: dict[frozenset[str], str] = {
    frozenset({"prompt", "completion"}): "rlhf sft",
    frozenset({"prompt"}): "rlhf ppo or grpo",
}
"""Columns that tell it where they are all: another one might be the one that is missed."""


def stages_of(given: Iterable[str], columns: Mapping[str, str], kind: Kind) -> str:
    """The stages that a row with the `given` columns is for; empty where the row is one of `kind`, or it is not clear.

    Args:
        columns: our name of a field -> the file's.
    """
    if kind == "text":  # its column was named by hand
        return ""
    own = {column: name for name, column in columns.items()}
    names = frozenset(own.get(column) or ALIASES.get(column, column) for column in given)
    distinct = (stages for signs, kinds, stages in SIGNS if signs <= names and kind not in kinds)
    return next(distinct, WHOLE.get(names, ""))
