"""Where scores come from: a reward model, a count of one token, or what reads text: a user's function, or a service.

Every source maps samples to one number a reply. Left out: ensembles, and replies that go without a score.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.config.rewards import Reward, is_service
from rlhf.data.collate import last_row, token_batch
from rlhf.data.order import chunks
from rlhf.errors import DataError
from rlhf.models.roles import RewardModel
from rlhf.rollout.engines import Samples
from rlhf.rollout.functions import FunctionProcess
from rlhf.rollout.services import RewardService

RewardSource = Callable[[Samples, Sequence[str]], Tensor]
"""(samples, the users' words) -> (B,) scores"""


LARGEST_SCORE = torch.finfo(torch.float32).max


class Reader(Protocol):
    """(prompts, replies) -> a score for each reply, not yet looked at."""

    source: str

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Any: ...


def open_reader(config: Reward) -> Reader | None:
    """The user's function or service, if that is the reward: found and loaded, or a DataError or ConfigError that says why not.

    It needs no model, so a run opens it before it loads any.
    """
    if is_service(config.source):
        return RewardService(config.source, config.timeout_s, config.retries, config.allow_private)
    if ":" in config.source and not config.source.startswith("count:"):
        return FunctionProcess(config.source, config.timeout_s, config.retries)
    return None


def open_reward(
    source: str,
    reader: Reader | None,
    model: RewardModel | None,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int,
    most: Callable[[int], int] = lambda count: count,
) -> RewardSource:
    """`most` gives the largest of a number over all ranks, which call a model that they divide equally often."""
    if reader is not None:
        return TextReward(reader, tokenizer)
    if model is not None:
        return ModelReward(model, micro_batch_size, most)
    return CountReward(source.removeprefix("count:"), tokenizer)


class ModelReward:
    def __init__(self, model: RewardModel, micro_batch_size: int, most: Callable[[int], int]) -> None:
        self.model, self.micro_batch_size, self.most = model, micro_batch_size, most

    def __call__(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Rows of like length are scored together."""
        order = sorted(range(len(samples)), key=lambda row: len(samples.prompts[row]) + len(samples.responses[row]))
        device = next(self.model.model.parameters()).device
        scores = torch.zeros(len(samples))
        micro_batches = list(chunks(order, self.micro_batch_size))
        for number in range(self.most(len(micro_batches))):
            rows = micro_batches[min(number, len(micro_batches) - 1)]  # the last once more, to keep ranks in step
            batch = token_batch(last_row(samples.prompts[row], samples.responses[row]) for row in rows)
            scores[rows] = self.model.scores(batch.to(device)).float().cpu()
        return scores


class CountReward:
    """How often a token occurs in a reply: a reward whose optimum is known."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.ids = {i for i in range(len(tokenizer)) if tokenizer.decode([i]) == text}
        if not self.ids:
            raise DataError(f"reward count:{text}: no single token of this tokenizer reads {text!r}")

    def __call__(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        return torch.tensor([float(sum(token in self.ids for token in response)) for response in samples.responses])


class TextReward:
    """A user's function or a service: it is given prompts and replies as text."""

    def __init__(self, reader: Reader, tokenizer: PreTrainedTokenizerBase) -> None:
        self.reader, self.tokenizer = reader, tokenizer

    def __call__(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        scores = self.reader(list(texts), decode(samples.responses, self.tokenizer))
        return torch.tensor(checked_scores(scores, len(samples), self.reader.source))


def decode(responses: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]  # pyright: ignore


def checked_scores(scores: Any, count: int, source: str) -> list[float]:
    """`count` numbers that float32 can hold, or a DataError that names the first that is none.

    True and False are 1 and 0, as everywhere in Python; text is no number, whatever it says. NaN and infinity pass: what
    becomes of them is the run's to say (non_finite). None of it is tried again: the same replies would get the same scores.
    """
    if not isinstance(scores, list) or len(scores) != count:
        raise DataError(f"{source}: returned {_described(scores)}, expected a list of {count} numbers")
    for row, score in enumerate(scores):
        found = f"{source}: the score of reply {row} is {reprlib.repr(score)}"
        if not isinstance(score, int | float):
            raise DataError(f"{found}, expected a number; mend the function")
        if LARGEST_SCORE < abs(score) < math.inf:
            raise DataError(f"{found}, more than float32 holds; scale the scores down")
    return [float(score) for score in scores]


def _described(scores: Any) -> str:
    return f"{len(scores)} values" if isinstance(scores, list) else type(scores).__name__
