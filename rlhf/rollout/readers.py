"""Rewards and scorers that read text: a user's function, a verifier, a service. Found, loaded and asked for what they need
before any model is opened, as they need none."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch

from rlhf.config.rewards import Reward, RewardSource, Scoring, kind_of
from rlhf.config.sections import Data
from rlhf.data.examples import PromptExample
from rlhf.data.order import chunks
from rlhf.data.rows import first_columns
from rlhf.errors import DataError
from rlhf.rollout import verifiers
from rlhf.rollout.functions import OFFERED, FunctionProcess
from rlhf.rollout.services import RewardService

AT_ONCE = 1024
"""Rows whose answers a verifier reads in one call, which has a deadline."""

LARGEST_SCORE = torch.finfo(torch.float32).max


class Reader(Protocol):
    """(prompts, replies, what else it may take by name) -> a score for each reply, not yet looked at."""

    source: str

    @property
    def columns(self) -> Sequence[str]:
        """Columns of the prompt rows that it asks for."""
        ...

    def __call__(self, prompts: Sequence[str], responses: Sequence[str], **others: Sequence[Any]) -> Any: ...


def open_readers(config: Reward, data: Data) -> dict[str, Reader]:
    """The sources of a reward that read text, by name.

    Raises:
        DataError, ConfigError: one cannot be loaded or may not be asked, or asks for a column that the data do not have.
    """
    return open_readers_of(config, filter(None, (data.train, data.eval)), data.max_line_bytes)


def open_readers_of(config: Scoring, files: Iterable[str], max_line_bytes: int) -> dict[str, Reader]:
    """As `open_readers`, of files by their names."""
    readers = {name: reader for name, part in config.parts.items() if (reader := _open_reader(part, config)) is not None}
    for file in files:
        for reader in readers.values():
            _require_columns(reader, file, max_line_bytes)
    return readers


def open_scorers(sources: Iterable[str], config: Reward, data: Data) -> list[Reader]:
    """Functions that score the replies to the held-out prompts; raises as `open_readers`."""
    scorers: list[Reader] = [FunctionProcess(source, config.timeout_s, config.retries) for source in sources]
    if data.eval:
        for scorer in scorers:
            _require_columns(scorer, data.eval, data.max_line_bytes)
    return scorers


def _open_reader(part: RewardSource, config: Scoring) -> Reader | None:
    match kind_of(part.source):
        case "service":
            return RewardService(part.source, config.timeout_s, config.retries, config.allow_private, config.allow_hosts)
        case "verifier":
            place = f"{verifiers.__file__}:{part.source.partition(':')[2]}"
            return FunctionProcess(part.source, config.timeout_s, 0, place, {"answer": part.answer})  # says the same each time
        case "function":
            return FunctionProcess(part.source, config.timeout_s, config.retries)
        case _:
            return None


def _require_columns(reader: Reader, file: str, max_line_bytes: int) -> None:
    """By the first row; each of the others is looked at when it is read."""
    there = first_columns(file, max_line_bytes) if reader.columns else []
    if there and (unknown := [column for column in reader.columns if column not in there]):
        raise DataError(
            f"{reader.source}: asks for {', '.join(unknown)}; what can be given is {', '.join(OFFERED)} "
            f"and the columns of {file}: {', '.join(there)}"
        )


def columns_asked(config: Scoring, readers: Iterable[Reader]) -> dict[str, str]:
    """Every column that a reader or `minus_answer` asks for, and one who does."""
    of_answers = {part.answer: f"{part.source} (minus_answer)" for part in config.parts.values() if part.minus_answer}
    return of_answers | {column: reader.source for reader in readers for column in reader.columns}


def read(reader: Reader, asked: Sequence[PromptExample], responses: Sequence[str], **others: Sequence[Any]) -> Any:
    """What a reader makes of replies to prompts: what it is given beside their texts is the rows' columns that it asks for."""
    columns = {name: [prompt.row.others[name] for prompt in asked] for name in reader.columns}
    known = {"where": [prompt.row.where for prompt in asked], **others}
    return reader([prompt.text for prompt in asked], responses, **(columns | known))


def require_answers(readers: Iterable[Reader], prompts: Sequence[PromptExample]) -> None:
    """Raises DataError where a verifier cannot read the answer of a row, which may be sampled hours from now."""
    for reader in readers:
        for part in chunks(prompts, AT_ONCE) if kind_of(reader.source) == "verifier" else ():
            read(reader, part, [""] * len(part))


def checked_scores(scores: Any, count: int, source: str) -> list[float | None]:
    """`count` numbers that float32 can hold, or None for a reply without a score; or a DataError that names the first that is
    neither.

    True and False are 1 and 0, as everywhere in Python; text is no number, whatever it says. NaN and infinity pass: what
    becomes of them is the run's to say (non_finite). None of it is tried again: the same replies would get the same scores.
    """
    if not isinstance(scores, list) or len(scores) != count:
        raise DataError(f"{source}: returned {_described(scores)}, expected a list of {count} numbers")
    for row, score in enumerate(scores):
        found = f"{source}: the score of reply {row} is {reprlib.repr(score)}"
        if score is not None and not isinstance(score, int | float):
            raise DataError(f"{found}, expected a number, or None for no score; mend the function")
        if score is not None and LARGEST_SCORE < abs(score) < math.inf:
            raise DataError(f"{found}, more than float32 holds; scale the scores down")
    return [None if score is None else float(score) for score in scores]


def _described(scores: Any) -> str:
    return f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
