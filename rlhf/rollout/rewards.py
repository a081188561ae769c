"""Where scores come from: a reward model, a count of one token, or a Python function of the user's.

Every source maps samples to one number a reply. Left out: services, ensembles and functions in a process of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf.data.order import chunks
from rlhf.errors import DataError
from rlhf.models.roles import RewardModel
from rlhf.rollout.engines import Samples
from rlhf.rollout.experience import reply_batch, reply_tensors

RewardSource = Callable[[Samples, Sequence[str]], Tensor]
"""(samples, the users' words) -> (B,) scores"""


def open_reward(
    source: str,
    model: RewardModel | None,
    tokenizer: PreTrainedTokenizerBase,
    micro_batch_size: int,
    most: Callable[[int], int] = lambda count: count,
) -> RewardSource:
    """`most` gives the largest of a number over all ranks, which call a model that they divide equally often."""
    if model is not None:
        return ModelReward(model, int(tokenizer.pad_token_id), micro_batch_size, most)  # pyright: ignore[reportArgumentType]
    if source.startswith("count:"):
        return CountReward(source.removeprefix("count:"), tokenizer)
    return FunctionReward(source, tokenizer)


class ModelReward:
    def __init__(self, model: RewardModel, pad_id: int, micro_batch_size: int, most: Callable[[int], int]) -> None:
        self.model, self.pad_id, self.micro_batch_size, self.most = model, pad_id, micro_batch_size, most

    def __call__(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        """Rows of like length are scored together."""
        order = sorted(range(len(samples)), key=lambda row: len(samples.prompts[row]) + len(samples.responses[row]))
        tokens, mask, _ = reply_tensors(samples, self.pad_id)
        device = next(self.model.model.parameters()).device
        scores = torch.zeros(len(samples))
        micro_batches = list(chunks(order, self.micro_batch_size))
        for number in range(self.most(len(micro_batches))):
            rows = micro_batches[min(number, len(micro_batches) - 1)]  # the last once more, to keep ranks in step
            longest = max(len(samples.responses[row]) for row in rows)
            prompts = [samples.prompts[row] for row in rows]
            batch = replace(reply_batch(prompts, tokens[rows, :longest], mask[rows, :longest], self.pad_id), keep=0)
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


class FunctionReward:
    """`module:function` or `file.py:function`, called with those of `prompts` and `responses` (lists of str) that it names."""

    def __init__(self, source: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.source, self.tokenizer, self.function = source, tokenizer, load_function(source)

    def __call__(self, samples: Samples, texts: Sequence[str]) -> Tensor:
        scores = call_by_name(
            self.function, self.source, prompts=list(texts), responses=decode(samples.responses, self.tokenizer)
        )
        return torch.tensor(checked_scores(scores, len(samples), self.source))


def decode(responses: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]  # pyright: ignore


def load_function(source: str) -> Callable[..., Any]:
    """Raises DataError when the place or the function is not there."""
    place, _, name = source.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(place).stem, place)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:  # whatever the user's own module does
        raise DataError(f"{source}: cannot import {place!r}: {type(error).__name__}: {error}") from error
    if not callable(getattr(module, name, None)):
        raise DataError(f"{source}: {place} has no function {name!r}")
    return getattr(module, name)


def call_by_name(function: Callable[..., Any], source: str, **offered: Any) -> Any:
    wanted = inspect.signature(function).parameters
    unknown = [name for name, p in wanted.items() if name not in offered and p.default is p.empty and p.kind not in (2, 4)]
    if unknown:
        raise DataError(f"{source}: asks for {', '.join(unknown)}; what can be given is {', '.join(offered)}")
    try:
        return function(**{name: value for name, value in offered.items() if name in wanted})
    except Exception as error:  # the user's own code: the message says where in it
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise DataError(f"{source}: raised {type(error).__name__} at {place.filename}:{place.lineno}: {error}") from error


def checked_scores(scores: Any, count: int, source: str) -> list[float]:
    """`count` floats, or a DataError that names the first that is none; one that is not finite is the run's to judge."""
    if not hasattr(scores, "__len__") or len(scores) != count:
        raise DataError(f"{source}: returned {_described(scores)}, expected a list of {count} numbers")
    for row, score in enumerate(scores):
        if hasattr(score, "item"):  # a number of torch or numpy
            score = score.item()
        if not isinstance(score, Real):
            raise DataError(f"{source}: the score of reply {row} is {score!r}, expected a number; mend the function")
    return [float(score) for score in scores]


def _described(scores: Any) -> str:
    return f"{len(scores)} values" if hasattr(scores, "__len__") else type(scores).__name__
