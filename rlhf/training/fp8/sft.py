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
from rlhf.functional.logprobs import token_logprobs
from rlhf.functional.sft import IGNORED, sft_loss
from rlhf.models.actor_critic import ActorCritic
from rlhf.models.roles import Roles, open_sft

Batch = tuple[TokenBatch, Tensor]
"""(tokens, labels)"""


@dataclass(frozen=True)
class Subject:
    """A policy on its device, and how it computes."""

    roles: Roles
    config: SftConfig
    device: torch.device

    @property
    def policy(self) -> ActorCritic:
        return self.roles.policy

    def batches(self, rows: Sequence[SftExample]) -> list[Batch]:
        """Micro-batches on the device; rows of like length share one."""
        parts = chunks(sorted(rows, key=len), self.config.micro_batch_size)
        return [(tokens.to(self.device), labels.to(self.device)) for tokens, labels in map(self._collated, parts)]

    def logits(self, tokens: TokenBatch) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            logits = self.policy(tokens, roles=("actor",)).logits
        assert logits is not None
        return logits

    def loss(self, batches: Sequence[Batch], backward: bool = True) -> float:
        """Mean over all trained tokens; its gradient is added to the weights'."""
        count, total = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in batches), 0.0
        for tokens, labels in batches:
            part = sft_loss(self.logits(tokens), labels)[0] / count
            if backward:
                part.backward()
            total += float(part.detach())
        return total

    @torch.no_grad()
    def logprobs(self, batches: Sequence[Batch]) -> Tensor:
        """(N,) of all trained tokens."""
        found = []
        for tokens, labels in batches:
            targets, logits = labels[:, 1:], self.logits(tokens)[:, :-1]
            trained = targets != IGNORED
            found.append(token_logprobs(logits, torch.where(trained, targets, 0))[trained])
        return torch.cat(found)

    def gradients(self) -> dict[str, Tensor]:
        """Takes the gradients off the weights."""
        taken = {name: p.grad for name, p in self.policy.named_parameters() if p.grad is not None}
        self.policy.zero_grad(set_to_none=True)
        return taken

    def _collated(self, rows: Sequence[SftExample]) -> Batch:
        return sft_batch(rows, self.roles.pad_id)


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
