"""What a reward model is taught and by what scale it speaks: the sections of the config that only its training has."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from rlhf.config.sections import Data, Place, Section


class RmData(Data):
    reference: Place | None = None
    """Rows of prompt and completion, as for SFT: the answers that `normalize: reference` puts at 0."""


class RmLoss(Section):
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Part of the pairs taken to be labelled the wrong way round."""
    center_coef: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared sum of a pair's two scores, which draws scores to a mean of 0 (Eisenstein et al. 2023: 0.01)."""
