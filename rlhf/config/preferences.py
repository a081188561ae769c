"""Sections of the stages that learn from preferences alone, DPO and KTO: the losses, and what they are measured from."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from rlhf.config.sections import Optimizer, Place, Positive, Section

OPTIONS_OF_LOSSES = {
    "beta": ("dpo", "ipo", "simpo"),
    "label_smoothing": ("dpo",),
    "gamma": ("simpo",),
    "odds_weight": ("orpo",),
}
"""Options that only some losses of pairs have, by the name of the loss's parameter (rlhf/functional/dpo.py)."""

WITHOUT_REFERENCE = ("simpo", "orpo")

BETA_OF_SIMPO = 2.0
"""The least of those that Meng et al. 2024 use: 2 to 10, since averages over tokens are small."""


class StartingPolicy(Section):
    path: Place
    """The policy to improve, usually the SFT run: a Hugging Face id (`id@revision`), a Hugging Face, GGUF or run directory or
    file."""
    reference: Place | None = None
    """The frozen policy that log-ratios are measured from; none: the policy as it starts, which takes no second model."""


class DpoLoss(Section):
    kind: Literal["dpo", "ipo", "simpo", "orpo"] = "dpo"
    """The loss (docs/dpo.md): dpo and ipo are measured from the reference; simpo and orpo have none."""
    beta: Positive = 0.1
    """Strength of the pull to the reference: rewards are beta * log-ratio (ipo: the paper's tau). simpo: the scale of its
    rewards, there 2 where it is not given."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """dpo: the part of the pairs whose order is taken to be wrong (conservative DPO)."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """simpo: margin by which the chosen reply's reward should be ahead; the paper's gamma / beta of 0.5."""
    odds_weight: Positive = 0.1
    """orpo: weight of the odds ratio beside the loss on the chosen reply, the paper's lambda."""

    @model_validator(mode="before")
    @classmethod
    def _simpo_has_a_beta_of_its_own(cls, values: Any) -> Any:
        return {"beta": BETA_OF_SIMPO, **values} if isinstance(values, dict) and values.get("kind") == "simpo" else values

    @model_validator(mode="after")
    def _has_meaning(self) -> DpoLoss:
        """What a loss does not have is no option of it: passed over in silence, a run would not be what its config says."""
        for name, kinds in OPTIONS_OF_LOSSES.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no meaning with kind {self.kind}, only with {', '.join(kinds)}")
        return self

    @property
    def referenced(self) -> bool:
        return self.kind not in WITHOUT_REFERENCE

    @property
    def options(self) -> dict[str, float]:
        """What the loss takes beside its scores."""
        return {name: getattr(self, name) for name, kinds in OPTIONS_OF_LOSSES.items() if self.kind in kinds}


class KtoLoss(Section):
    referenced: ClassVar[bool] = True

    beta: Positive = 0.1
    """Strength of the pull to the reference: rewards are beta * log-ratio."""
    desirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of desirable replies. With fewer of one kind, raise its weight until weight * count of the two is within 1 to 4/3."""
    undesirable_weight: Annotated[float, Field(ge=0)] = 1.0
    """Of undesirable replies."""

    @model_validator(mode="after")
    def _learns(self) -> KtoLoss:
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError("desirable_weight and undesirable_weight may not both be 0: nothing would be learned")
        return self


class PreferenceOptimizer(Optimizer):
    lr: Positive = 1e-6
    """Peak learning rate of AdamW (TRL's for DPO and KTO)."""
