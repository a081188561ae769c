"""Accuracy on parts of the pairs: by a field of the rows, and by which of two replies is the longer one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.collate import comparisons
from rlhf.data.examples import RankedExample
from rlhf.errors import DataError
from rlhf.functional.preference import accuracy, wilson_interval
from rlhf.training.reward_figures import lengths_of

Slices = dict[str, dict[str, float]]
"""`source: web` -> prompts, accuracy, accuracy_low, accuracy_high."""


def slices(examples: Sequence[RankedExample], scores: Tensor, fields: Sequence[str]) -> Slices:
    """By length, then by each of the fields, its largest slices first; a slice without a decided pair is left out.

    A prompt counts once: where only some of its pairs are in a slice, as much of it as they are.

    Args:
        scores: (R,) of every reply, example by example.
        fields: columns that each example has in `others`.

    Raises:
        DataError: a field is neither text nor a number nor a truth value.
    """
    pairs, lengths = comparisons(examples, like=scores), lengths_of(examples)
    right, longer_by = accuracy(scores[pairs.better], scores[pairs.worse]), lengths[pairs.better] - lengths[pairs.worse]
    which = {
        "better reply is longer": longer_by > 0,
        "better reply is shorter": longer_by < 0,
        "better reply is as long": longer_by == 0,
    }
    for field in fields:
        values = [_value(example, field) for example in examples]
        of_pairs = [value for value, example in zip(values, examples, strict=True) for _ in example.comparisons]
        for value, _ in Counter(values).most_common():
            which[f"{field}: {value}"] = torch.tensor([own == value for own in of_pairs])
    return {name: _figures(right, pairs.decided * inside) for name, inside in which.items() if (pairs.decided * inside).any()}


def _figures(right: Tensor, weight: Tensor) -> dict[str, float]:
    prompts, successes = float(weight.sum()), float((weight * right).sum())
    low, high = wilson_interval(successes, prompts)
    return {"prompts": prompts, "accuracy": successes / prompts, "accuracy_low": low, "accuracy_high": high}


def _value(example: RankedExample, field: str) -> str:
    value = example.others[field]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{example.where}: {field} is {type(value).__name__}; --slice takes text, numbers, true and false")
