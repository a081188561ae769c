"""How much replies repeat: within one of them, and one another. Token ids, no text."""

from __future__ import annotations

from collections.abc import Sequence


def ngrams(ids: Sequence[int], size: int) -> list[tuple[int, ...]]:
    return list(zip(*(ids[start:] for start in range(size)), strict=False))


def repeated(ids: Sequence[int], size: int = 4) -> float:
    """Share of a reply's n-grams that it has had before, 0 to below 1; of one too short for any, 0.

    seq-rep-n of Welleck et al. 2020 (arXiv:1908.04319), n = 4 as there: texts by people have 0.006, those that a language
    model decodes greedily 0.442.
    """
    found = ngrams(ids, size)
    return 1 - len(set(found)) / len(found) if found else 0.0


def distinct(replies: Sequence[Sequence[int]], size: int = 2) -> float:
    """Number of different n-grams in all replies, as a part of all n-grams there, 0 to 1; of replies without any, 0.

    distinct-n of Li et al. 2016 (arXiv:1510.03055). It falls with the number of n-grams: compare like with like.
    """
    different: set[tuple[int, ...]] = set()
    count = 0
    for ids in replies:
        found = ngrams(ids, size)
        different.update(found)
        count += len(found)
    return len(different) / count if count else 0.0
