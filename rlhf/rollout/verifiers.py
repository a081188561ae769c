"""Rewards that compare a reply with the answer of its row: 1 where it is right, else 0.

Called as a user's function is (functions.py), in a process with a deadline: a regular expression may take for ever. From the
standard library alone, as that process starts without ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import TypeVar

Value = TypeVar("Value")

NUMBER = re.compile(
    r"(?:(?<![\w.)])[-+\u2212]\$?)?"  # a sign, not the dash of 3-5
    r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"  # 1,234.5 or .5
    r"(?:[eE][-+]?[0-9]{1,4}(?![0-9]))?"
)


def exact(responses: Sequence[str], answer: Sequence[object], where: Sequence[str]) -> list[float]:
    """Equal but for white space around them."""
    rights = _texts(answer, where)
    return [float(response.strip() == right.strip()) for response, right in zip(responses, rights, strict=True)]


def numeric(responses: Sequence[str], answer: Sequence[object], where: Sequence[str]) -> list[float]:
    """The last number of the reply equals the last one of the answer, as numbers: 1,000.0 is 1000."""
    rights = _read(last_number, answer, where)
    return [float(last_number(response) == right) for response, right in zip(responses, rights, strict=True)]


def regex(responses: Sequence[str], answer: Sequence[object], where: Sequence[str]) -> list[float]:
    """The answer, a regular expression, is found somewhere in the reply."""
    patterns = _read(_pattern, answer, where)
    return [float(pattern.search(response) is not None) for response, pattern in zip(responses, patterns, strict=True)]


def last_number(text: str) -> Decimal | None:
    """The number that stands last, with or without commas between thousands; None where there is none."""
    found = NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "").replace("$", "").replace("\u2212", "-")) if found else None


def _pattern(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except re.error:
        return None


def _read(read: Callable[[str], Value | None], answers: Sequence[object], where: Sequence[str]) -> list[Value]:
    what = "number" if read is last_number else "regular expression"
    found = []
    for text, place in zip(_texts(answers, where), where, strict=True):
        value = read(text)
        if value is None:
            raise ValueError(f"{place}: the answer {text[:60]!r} is no {what}")
        found.append(value)
    return found


def _texts(answers: Sequence[object], where: Sequence[str]) -> list[str]:
    for answer, place in zip(answers, where, strict=True):
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"{place}: the answer is {type(answer).__name__}, expected text or a number")
    return [str(answer) for answer in answers]
