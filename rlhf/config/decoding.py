"""How replies are drawn when a policy is used and not trained. `rlhf generate`, `rlhf chat` and `rlhf.load_actor` share it."""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from rlhf.config.sections import Count, Place, Positive, Section
from rlhf.errors import ConfigError


class Decoding(Section):
    max_new_tokens: Count = 128
    """Longest reply, in tokens."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Logits are divided by it; 0: greedy."""
    top_k: Annotated[int, Field(ge=0)] | None = None
    """Sample from the k likeliest tokens only; 0 or none: not so. Excludes top_p; with neither, all tokens are sampled from."""
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    """Sample from the smallest set of tokens with this probability; 0 or none: not so. Excludes top_k."""
    repetition_penalty: Positive = 1.0
    """Logits of tokens that the prompt or the reply has already are divided by it, those below 0 multiplied (Keskar et al.
    2019); 1: no penalty."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """What is sampled follows from it and the prompt's place, whatever the batch size."""

    @model_validator(mode="after")
    def _one_filter(self) -> Decoding:
        if self.top_k and self.top_p:
            raise ValueError(f"top_k {self.top_k} and top_p {self.top_p:g} exclude each other: leave one of them out")
        if self.top_k == 0 and self.top_p == 0:
            raise ValueError("top_k and top_p are both 0: give one of them, or leave both out to sample from all tokens")
        for name in ("top_k", "top_p"):
            if self.temperature == 0 and getattr(self, name):
                raise ValueError(f"{name} has no meaning with temperature 0, which takes the likeliest token: leave it out")
        return self


class BatchDecoding(Decoding):
    """Many prompts at once."""

    samples_per_prompt: Count = 1
    """Replies to each prompt."""
    batch_size: Count = 64
    """Replies sampled at a time; memory and speed only."""
    json_schema: str | None = None
    """A JSON Schema, or a file of one: each reply that ends by itself is JSON that the schema allows (docs/inference.md). Needs
    the package llguidance."""

    @model_validator(mode="after")
    def _samples_differ(self) -> BatchDecoding:
        if self.temperature == 0 and self.samples_per_prompt > 1:
            raise ValueError("samples_per_prompt must be 1 with temperature 0: all replies to a prompt would be the same")
        return self


class Opening(Section):
    """What `rlhf.load_actor` and `rlhf.load_reward` take."""

    model: Place
    precision: Literal["fp32", "bf16"] = "fp32"
    template: Literal["auto", "chat", "plain"] = "auto"
    trust_remote_code: bool = False


class Rescoring(Section):
    """What the `score` of a reward model takes beside prompts."""

    replies: tuple[str, ...]
    finished: tuple[bool, ...] | None = None
    batch_size: Count = 16


Options = TypeVar("Options", bound=Section)


def checked(kind: type[Options], **options: Any) -> Options:
    """The options that a caller in Python gives.

    Raises:
        ConfigError: all that is wrong with them, a line each.
    """
    try:
        return kind(**options)
    except ValidationError as error:
        lines = []
        for detail in error.errors(include_url=False):
            place = ".".join(map(str, detail["loc"]))
            said = detail["msg"].removeprefix("Value error, ")
            lines.append(f"{place}: given {reprlib.repr(detail['input'])}: {said}" if place else said)
        raise ConfigError("\n".join(lines)) from None
