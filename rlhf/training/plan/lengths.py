"""How many rows there are and how long they are: of the data themselves, or as said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

from rlhf.config.schema import DpoConfig, KtoConfig, PolicyStage, RmConfig, SftConfig, Stage
from rlhf.data.collate import Row, last_row, reply_row
from rlhf.data.examples import pair_examples, prompt_examples, ranked_examples, rated_examples, sft_examples
from rlhf.data.templates import Template
from rlhf.models.load import load_generation_config, load_tokenizer, stop_ids


class Size(NamedTuple):
    """A row's tokens: of the prompt, of each reply, and at how many places of a reply a head is read."""

    prompt: int
    replies: tuple[int, ...]
    read: int = 0
    """SFT: trained tokens"""

    @property
    def tokens(self) -> int:
        """Of a forward over the row: replies share their prompt."""
        return self.prompt + sum(self.replies)


@dataclass(frozen=True)
class Lengths:
    rows: int
    """Of the file"""
    longest: list[Size]
    """Rows of the longest micro-batch first, as many as were asked for"""
    mean: Size
    source: str
    """Where this is from, in words"""


def lengths_of(config: Stage, rows: int | None, count: int) -> Lengths:
    """Of the training file, or of `rows` rows that are all as long as the config allows.

    Args:
        count: how many of the longest are wanted.

    Raises:
        DataError: the file is not there, or has rows that are no rows.
    """
    if rows is not None:  # packed or not: the longest there may be
        size = _largest(config)
        return Lengths(rows, [size] * count, size, f"{rows} rows as said by --rows, each as long as the config allows")
    sizes = sorted(_packed(config, _read(config)), key=lambda size: (size.tokens, size.read), reverse=True)
    many, replies = len(sizes), sum(len(size.replies) for size in sizes)
    mean_reply = sum(sum(size.replies) for size in sizes) / replies
    mean = Size(
        ceil(sum(size.prompt for size in sizes) / many),
        (ceil(mean_reply),) * round(replies / many),
        ceil(sum(size.read for size in sizes) / many),
    )
    longest = [sizes[index % many] for index in range(count)]
    data: Any = config.data  # pyright: ignore[reportAttributeAccessIssue]
    return Lengths(
        many, longest, mean, f"{data.train}: {many} rows of {sizes[0].tokens} tokens at most, {mean.tokens} on average"
    )


def micro_batch(config: Stage, sizes: Sequence[Size]) -> list[Row]:
    """As the stage collates it. Token ids are any: a prompt's only tell it from the others."""
    rows = []
    for number, (prompt, replies, read) in enumerate(sizes, start=1):
        for reply in replies:
            if isinstance(config, SftConfig):
                rows.append(Row([], [1] * reply, range(reply - 1 - min(read, reply - 1), reply - 1)))
            else:
                make = last_row if isinstance(config, RmConfig) else reply_row
                rows.append(make([number] * max(prompt, 1), [1] * reply))
    return rows


def _largest(config: Stage) -> Size:
    longest: int = config.data.max_length  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(config, SftConfig):
        return Size(0, (longest,), longest - 1)
    if isinstance(config, PolicyStage):
        return Size(longest, (config.rollout.max_new_tokens,))
    half = longest // 2
    return Size(half, (longest - half,) * (1 if isinstance(config, KtoConfig) else 2))


def _packed(config: Stage, sizes: list[Size]) -> list[Size]:
    """Packs as rows: as many as hold all tokens, and full, with the trained part that rows have on average."""
    if not isinstance(config, SftConfig) or not config.data.packing:
        return sizes
    tokens, length = sum(size.tokens for size in sizes), config.data.max_length
    read = ceil(length * sum(size.read for size in sizes) / tokens)
    return [Size(0, (length,), read)] * ceil(tokens / length)


def _read(config: Stage) -> list[Size]:
    spec: str = config.roles.actor if isinstance(config, PolicyStage) else config.model.path  # pyright: ignore
    tokenizer = load_tokenizer(spec, config.trust_remote_code)
    data: Any = config.data  # pyright: ignore[reportAttributeAccessIssue]
    template = Template(tokenizer, data.template, stop_ids(load_generation_config(spec), tokenizer))
    if isinstance(config, SftConfig):
        found = sft_examples(data.train, config.data, template).items
        return [Size(0, (len(one),), sum(one.trained[1:])) for one in found]
    if isinstance(config, RmConfig):
        ranked = ranked_examples(data.train, config.data, template).items
        return [Size(len(one.prompt), tuple(map(len, one.replies))) for one in ranked]
    if isinstance(config, DpoConfig):
        pairs = pair_examples(data.train, config.data, template).items
        return [Size(len(one.prompt), tuple(map(len, one.replies))) for one in pairs]
    if isinstance(config, KtoConfig):
        rated = rated_examples(data.train, config.data, template).items
        return [Size(len(one.prompt), (len(one.reply),)) for one in rated]
    assert isinstance(config, PolicyStage)
    asked = prompt_examples(data.train, data.model_copy(update={"extra_columns": "ignore"}), template).items
    return [Size(len(one), (config.rollout.max_new_tokens,)) for one in asked]
