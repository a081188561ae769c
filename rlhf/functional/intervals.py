"""How sure a mean over rows is, whatever its rows are: the bootstrap. Of a success rate: `preference.wilson_interval`.

Rows are what is drawn again, whole: the tokens of one document, or the pairs of one prompt, say much the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

RESAMPLES = 4000
"""Ends of a 95% interval are then the 100th value from either side; Efron and Tibshirani 1993 (section 13.3) ask for 1000."""
AT_ONCE = 1 << 22
"""Rows drawn at a time, over all resamples: 32 MB of places."""
SEED = 0
"""Of a generator of its own, so that equal numbers have equal intervals."""


def bootstrap_interval(
    totals: Float[Tensor, " N"], counts: Float[Tensor, " N"] | None = None, level: float = 0.95
) -> tuple[float, float] | None:
    """Percentile interval of totals.sum() / counts.sum() over rows drawn again (Efron 1979, Ann. Statist. 7, 1-26).

    With the differences of two models' totals it is the paired bootstrap. None where fewer than two rows count: one row does
    not show how far rows differ.

    Args:
        totals: of each row.
        counts: of things in each row (tokens), 0 or more; None: each row counts once.
    """
    totals = totals.double()
    counts = torch.ones_like(totals) if counts is None else counts.double()
    rows = len(totals)
    if int((counts > 0).sum()) < 2:
        return None
    generator = torch.Generator(totals.device).manual_seed(SEED)
    found = []
    for part in torch.arange(RESAMPLES).split(max(1, AT_ONCE // rows)):
        places = torch.randint(rows, (len(part), rows), generator=generator, device=totals.device)
        found.append(torch.stack([totals[places].sum(1), counts[places].sum(1)]))
    total, count = torch.cat(found, dim=1)
    ratios = (total / count)[count > 0]
    tail = (1 - level) / 2
    low, high = torch.quantile(ratios, torch.tensor([tail, 1 - tail], dtype=ratios.dtype, device=ratios.device)).tolist()
    return low, high
