"""What the FP8 commands look at: a policy and some rows, with the loss of the SFT stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pydantic import ValidationError
from torch import Tensor

from rlhf.config.schema import SftConfig
from rlhf.config.sections import OPTIONS_OF_RECIPES
from rlhf.data.collate import TokenBatch, sft_batch
from rlhf.data.examples import SftExample, sft_examples
from rlhf.data.order import chunks
from rlhf.data.templates import Template
from rlhf.errors import ConfigError
from rlhf.functional.sft import sft_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.roles import Roles, open_sft


@dataclass(frozen=True)
class Subject:
    """A policy on its device, and how it computes."""

    roles: Roles
    config: SftConfig
    device: torch.device

    @property
    def policy(self) -> ActorCritic:
        return self.roles.policy

    def batches(self, rows: Sequence[SftExample]) -> list[TokenBatch]:
        """Micro-batches on the device; rows of like length share one."""
        return [sft_batch(part).to(self.device) for part in chunks(sorted(rows, key=len), self.config.micro_batch_size)]

    def loss(self, batches: Sequence[TokenBatch], backward: bool = True) -> float:
        """Mean over all trained tokens; its gradient is added to the weights'."""
        count, total = sum(len(batch.targets) for batch in batches), 0.0
        for batch in batches:
            part = sft_loss(self._logprobs(batch)) / count
            if backward:
                part.backward()
            total += float(part.detach())
        return total

    @torch.no_grad()
    def logprobs(self, batches: Sequence[TokenBatch]) -> Tensor:
        """(N,) of all trained tokens."""
        return torch.cat([self._logprobs(batch) for batch in batches])

    def gradients(self) -> dict[str, Tensor]:
        """Takes the gradients off the weights."""
        taken = {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}
        self.policy.zero_grad(set_to_none=True)
        return taken

    def _logprobs(self, batch: TokenBatch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            found = self.policy(batch, roles=("actor",)).logprobs
        assert found is not None
        return found


def open_subject(config: SftConfig) -> Subject:
    if config.threads:
        torch.set_num_threads(config.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    roles = open_sft(config)
    roles.policy.to(device)
    return Subject(roles, config, device)


def read_rows(subject: Subject, path: str) -> list[SftExample]:
    """One example a row; packing is left out, as it changes nothing that is looked at here."""
    template = Template(subject.roles.tokenizer, subject.config.data.template, subject.roles.stop_ids)
    rows = sft_examples(path, subject.config.data, template).items
    subject.roles.check_context(max(map(len, rows)), "data.max_length")
    return rows


def with_fp8(config: SftConfig, **changes: object) -> SftConfig:
    """The config with other FP8 settings; options that a new recipe does not have are left to the others that are compared.

    Raises:
        ConfigError: no stage would take them, either.
    """
    settings = config.model_dump()
    settings["fp8"] |= changes
    for name, recipes in OPTIONS_OF_RECIPES.items():
        if settings["fp8"]["recipe"] not in recipes:
            del settings["fp8"][name]
    try:
        return SftConfig.model_validate(settings)
    except ValidationError as error:
        raise ConfigError(f"fp8: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error
