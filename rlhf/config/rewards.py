"""What a policy is rewarded for: the section of the config that reinforcement learning has of it."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from rlhf.config.sections import Place, Positive, Section


def is_service(source: str) -> bool:
    """Whether a reward's source is the address of a service."""
    return "://" in source and not source.startswith("count:")


class Reward(Section):
    source: Place
    """A reward model (any model source), `count:TEXT` (how often TEXT's token occurs), a Python function: `module:function`
    or `file.py:function`, called with the arguments it names among prompts, responses; it returns one number per reply; or a
    service: `https://...` (docs/rewards.md)."""
    timeout_s: Positive = 60.0
    """A function or a service that takes longer for one call, in seconds, has failed. In several processes all tries of a call
    must end within the 10 minutes that the others wait."""
    retries: Annotated[int, Field(ge=0)] = 2
    """How often a call that failed is made again before the run ends."""
    allow_private: bool = False
    """Let a service be on this machine or in a private network."""
    gate: bool = True
    """Refuse a reward model of an RM run whose held-out accuracy is not above chance: its 95% interval reaches 0.5."""
    weight: float = 1.0
    """Scores are multiplied by it; a negative weight turns a reward into a penalty."""
    normalize: Literal["none", "running"] = "none"
    """running: subtract the mean and divide by the deviation of all scores so far."""
    clip: Positive | None = None
    """Scores are cut to [-clip, clip] after weighting and normalising."""
    missing_eos: Literal["replace", "subtract", "none"] = "replace"
    """A reply that never ends: its score becomes `missing_eos_value`, is lowered by it, or stays."""
    missing_eos_value: float = -1.0
    """See `missing_eos`; for `subtract` a positive number is taken off."""

    @field_validator("source")
    @classmethod
    def _is_plain_address(cls, source: str) -> str:
        """The messages leave out the address: it may hold a password."""
        if not is_service(source):
            return source
        try:
            address = urlsplit(source)
            complete = bool(address.hostname) and (address.port is None or address.port > 0)
        except ValueError:  # brackets without an IPv6 address, a port that is no number
            raise ValueError("not an address; a service has the form https://host:port/path") from None
        if address.scheme not in ("http", "https") or not complete:
            raise ValueError(f"{address.scheme}:// is no service to ask; it has the form https://host:port/path")
        return source
