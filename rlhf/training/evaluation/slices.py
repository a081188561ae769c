"""Accuracy on parts of the pairs: by a field of the rows, and by which of two replies is the longer one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.data.collate import Comparisons, comparisons
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
    pairs, lengths = comparisons(examples, like=scores.double()), lengths_of(examples)
    right, longer_by = accuracy(scores[pairs.better], scores[pairs.worse]), lengths[pairs.better] - lengths[pairs.worse]
    by_length = (longer_by.sign().long() - 1) % 3  # signs 1, -1 and 0 become places 0, 1 and 2
    found = _figures([f"better reply is {how}" for how in ("longer", "shorter", "as long")], by_length, right, pairs)
    for field in fields:
        values = [_value(example, field) for example in examples]
        codes = {value: code for code, (value, _) in enumerate(Counter(values).most_common())}
        of_pairs = [codes[value] for value, example in zip(values, examples, strict=True) for _ in example.comparisons]
        which = torch.tensor(of_pairs, dtype=torch.long, device=right.device)
        found |= _figures([f"{field}: {value}" for value in codes], which, right, pairs)
    return found


def _figures(names: Sequence[str], which: Tensor, right: Tensor, pairs: Comparisons) -> Slices:
    """All slices in one pass, as a field may have as many values as there are rows; `which`: (P,) the slice of each pair."""
    none = pairs.decided.new_zeros(len(names))
    prompts = none.index_add(0, which, pairs.decided)
    successes = none.index_add(0, which, pairs.decided * right)
    found = {}
    for name, count, successful in zip(names, prompts.tolist(), successes.tolist(), strict=True):
        if count:
            low, high = wilson_interval(successful, count)
            found[name] = {"prompts": count, "accuracy": successful / count, "accuracy_low": low, "accuracy_high": high}
    return found


def _value(example: RankedExample, field: str) -> str:
    value = example.others[field]
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(f"{example.where}: {field} is {type(value).__name__}; --slice takes text, numbers, true and false")
