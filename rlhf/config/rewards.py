"""What a policy is rewarded for: the section of the config that reinforcement learning has of it."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf.config.sections import Place, Positive, Section

VERIFIERS = ("exact", "numeric", "regex")

ONLY = "reward"
"""The name of the source where there is one."""

TAKEN = (
    *("score", "score_std", "shaped", "masked", "disagreement", "same_scores", "length_correlation"),
    *("length", "ended", "kl"),
)
"""Metrics of every run, beside those that bear the names of sources."""

Kind = Literal["model", "count", "verifier", "function", "service"]


def is_service(source: str) -> bool:
    """Whether a reward's source is the address of a service."""
    return "://" in source and not source.startswith("count:")


def kind_of(source: str) -> Kind:
    if is_service(source):
        return "service"
    kinds: dict[str, Kind] = {"count": "count", "verify": "verifier"}
    return kinds.get(source.partition(":")[0], "function") if ":" in source else "model"


class RewardSource(Section):
    source: Place
    """What scores, as in `reward.source`."""
    weight: float = 1.0
    """Scores are multiplied by it; a negative weight turns a reward into a penalty."""
    answer: str = "answer"
    """verify, minus_answer: the column of the prompt rows that has the right answer (regex: a regular expression)."""
    minus_answer: bool = False
    """Take off what the source gives the row's answer as a reply."""

    @field_validator("source")
    @classmethod
    def _is_plain_address(cls, source: str | None) -> str | None:
        """The messages leave out the address: it may hold a password."""
        if source is None or not is_service(source):
            return source
        try:
            address = urlsplit(source)
            complete = bool(address.hostname) and (address.port is None or address.port > 0)
        except ValueError:  # brackets without an IPv6 address, a port that is no number
            raise ValueError("not an address; a service has the form https://host:port/path") from None
        if address.scheme not in ("http", "https") or not complete:
            raise ValueError(f"{address.scheme}:// is no service to ask; it has the form https://host:port/path")
        return source

    @model_validator(mode="after")
    def _has_use_of_an_answer(self) -> RewardSource:
        verifies = self.source is not None and kind_of(self.source) == "verifier"
        if verifies and self.source.partition(":")[2] not in VERIFIERS:
            raise ValueError(f"source {self.source}: there are {', '.join(f'verify:{name}' for name in VERIFIERS)}")
        if verifies and self.minus_answer:
            raise ValueError("minus_answer has no meaning with verify, which compares with the answer already")
        if self.answer != "answer" and not verifies and not self.minus_answer:
            raise ValueError("answer has no meaning without verify or minus_answer: leave it out")
        return self


class Scoring(RewardSource):
    """Where scores come from."""

    needed: ClassVar[bool] = True
    """Whether there must be a source."""

    source: Place | None = None  # several are in `sources`
    """A reward model (any model source), `count:TEXT` (how often TEXT's token occurs), `verify:exact`, `verify:numeric` or
    `verify:regex` (1 where the reply is, ends in or holds the row's answer, else 0), a Python function: `module:function` or
    `file.py:function`, called with the arguments it names; or a service: `https://...` (docs/rewards.md)."""
    sources: dict[str, RewardSource] = Field(default_factory=dict)
    """In place of `source`: several, by names of your own, which their metrics bear (`reward/NAME`)."""
    combine: Literal["sum", "mean", "min", "mean_minus_std"] = "sum"
    """What becomes of the weighted scores of several sources; the last three are for an ensemble of reward models."""
    std_coef: Annotated[float, Field(ge=0)] = 1.0
    """mean_minus_std: how many (biased) standard deviations over the sources are taken off their mean."""
    on_failure: Literal["fail", "mask"] = "fail"
    """A function or a service that fails on all tries: end the run, or learn nothing from the replies it was asked for."""
    timeout_s: Positive = 60.0
    """A function or a service that takes longer for one call, in seconds, has failed. In several processes all tries of a call
    must end within the 10 minutes that the others wait."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a call that failed is made again before the run ends."""
    allow_private: bool = False
    """Let a service be on this machine or in a private network."""
    gate: bool = True
    """Refuse a reward model of an RM run whose held-out accuracy is not above chance: its 95% interval reaches 0.5."""
    allow_hosts: tuple[str, ...] = ()
    """The only hosts that a service may be on; empty: any."""

    @property
    def parts(self) -> dict[str, RewardSource]:
        """Every source by its name. The weight of a single one is that of the whole, and not told here again."""
        if self.sources:
            return self.sources
        return {ONLY: RewardSource.model_construct(source=self.source, answer=self.answer, minus_answer=self.minus_answer)}

    @property
    def models(self) -> dict[str, str]:
        """The sources that are models."""
        return {name: part.source for name, part in self.parts.items() if kind_of(part.source) == "model"}

    @model_validator(mode="after")
    def _one_or_several(self) -> Scoring:
        if not self.needed and not self.model_fields_set:
            return self
        if (self.source is None) == (not self.sources):
            given = "both are given: keep one" if self.sources else "neither is given: give --reward SOURCE, or a section"
            raise ValueError(f"source is for one reward, sources for several, and {given}")
        for name in ("answer", "minus_answer") if self.sources else ("combine",):
            if getattr(self, name) != type(self).model_fields[name].default:
                one = "of each source: give it in `sources`" if self.sources else "for several: give them in `sources`"
                raise ValueError(f"{name} is {one}")
        if self.allow_hosts and all(kind_of(part.source) != "service" for part in self.parts.values()):
            raise ValueError("allow_hosts has no meaning without a service")
        return self

    @field_validator("sources")
    @classmethod
    def _are_names_of_metrics(cls, sources: dict[str, RewardSource]) -> dict[str, RewardSource]:
        for name in sources:
            if not re.fullmatch(r"[A-Za-z]\w*", name, re.ASCII):
                raise ValueError(f"{name} is no name for a source: take letters, digits and _, a letter first")
            if name in TAKEN or name.removesuffix("_std") in (sources.keys() - {name}):
                raise ValueError(f"{name} is the name of another metric: take one but {', '.join(TAKEN)}, NAME_std")
        return sources


class Reward(Scoring):
    """Where scores come from, and what is made of them."""

    pairs: Place | None = None
    """Rows of prompt, chosen, rejected (and columns that the sources ask for): before anything is learned, the reward is asked
    which reply it prefers in the first 256; `gate` refuses one that prefers the worse. None: it is taken at its word."""
    normalize: Literal["none", "running"] = "none"
    """running: subtract the mean and divide by the deviation of all scores so far."""
    clip: Positive | None = None
    """Scores are cut to [-clip, clip] after weighting and normalising."""
    length_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off a score, after clipping, for each token beyond `length_budget`."""
    length_budget: Annotated[int, Field(ge=0)] = 0
    """Tokens of a reply that are free of `length_penalty`."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """A reply that never ends: its score becomes `missing_eos_value`, is lowered by it, or stays."""
    missing_eos_value: float = -1.0
    """See `missing_eos`; for `subtract` a positive number is taken off."""

    @model_validator(mode="after")
    def _has_a_penalty(self) -> Reward:
        if self.length_budget and not self.length_penalty:
            raise ValueError("length_budget has no meaning without length_penalty")
        return self
