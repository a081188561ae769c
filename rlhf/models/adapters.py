"""All roles of PPO on one frozen base: its weights are in memory once, and a role is a LoRA adapter on it.

PEFT keeps the adapters by name in the layers of one causal language model; the scalar heads stand beside it. The reference is
the base with no adapter, or with the actor's as it started. One adapter is active at a time, outside of a forward the actor's:
`policy.actor` is the actor here as everywhere.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf.data.collate import TokenBatch
from rlhf.models.actor_critic import ActorCritic, Output, told_by, unwrapped
from rlhf.models.heads import HEAD
from rlhf.models.trunk import Trunk, checkpoint_activations

ACTOR, CRITIC, REFERENCE, REWARD = "actor", "critic", "reference", "reward"
TRAINED = (ACTOR, CRITIC)

OF_ONE_ROLE = re.compile(r"\.lora_\w+\.(\w+)\.|^heads\.(\w+)\.")
"""In the name of a parameter: the adapter or head it belongs to. What does not match is the base."""


class AdaptedBase(ActorCritic):
    """`base` has an adapter for each role but those that are the base itself; `heads` are the critic's and the reward's."""

    def __init__(self, base: PeftModel, heads: Mapping[str, nn.Linear]) -> None:
        super().__init__(actor=base)
        self.heads = nn.ModuleDict(heads)
        self.role = ACTOR
        self._layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
        self._switch_to(ACTOR)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(owner(name) in TRAINED)
        inner = base.get_base_model()
        if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
            # Non-reentrant checkpointing computes layers again in backward, when another role's adapter may be active.
            checkpoint_activations(inner, context_fn=self._forward_and_recomputation)  # pyright: ignore[reportArgumentType]

    def forward(
        self, batch: TokenBatch, roles: tuple[str, ...] = TRAINED, temperature: float = 1.0, entropy: bool = False
    ) -> Output:
        """Actor or reference give the log-probabilities, critic or reward the values: at most one of each in one call."""
        logprobs = values = entropies = None
        for role in roles:
            trunk = Trunk(unwrapped(self.base), batch, active=partial(self.active, role))
            if role in self.heads:
                values = self.heads[role](trunk.hidden).squeeze(-1)
            else:
                logprobs, entropies = told_by(trunk, temperature, entropy)
        return Output(logprobs, values, entropies)

    @property
    def base(self) -> PeftModel:
        return self.actor  # pyright: ignore[reportReturnType]

    def active(self, role: str) -> AbstractContextManager[None]:
        """The adapter of a role in place of the one before; none, where the role is the base itself."""
        return _Active(self, role)

    def part(self, role: str) -> nn.Module:
        return RoleAdapter(self, role)

    def weights_of(self, role: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in self.state_dict().items() if owner(name) in (None, role)}

    def _forward_and_recomputation(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), self.active(self.role)

    def _switch_to(self, role: str) -> None:
        self.role = role
        for layer in self._layers:
            # Not `set_adapter`, which says anew what is trained: that is settled, and engines hold on to it.
            layer._active_adapter = [role]


class _Active(AbstractContextManager[None]):
    """May be entered again, as when one graph is walked backward twice."""

    def __init__(self, policy: AdaptedBase, role: str) -> None:
        self.policy, self.role = policy, role

    def __enter__(self) -> None:
        self.before = self.policy.role
        self.policy._switch_to(self.role)

    def __exit__(self, *_: object) -> None:
        self.policy._switch_to(self.before)


class RoleAdapter(nn.Module):
    """One role of an adapted base, to be saved as PEFT saves a model of its own."""

    def __init__(self, policy: AdaptedBase, role: str) -> None:
        super().__init__()
        self.base, self.role = policy.base, role
        self.score = dict(policy.heads.items()).get(role)
        self.peft_config = {role: policy.base.peft_config[role]}

    def get_base_model(self) -> nn.Module:
        return self.base.get_base_model()

    def save_pretrained(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        config: LoraConfig = copy.copy(self.peft_config[self.role])  # pyright: ignore[reportAssignmentType]
        tensors = get_peft_model_state_dict(self.base, adapter_name=self.role, save_embedding_layers=False)
        if self.score is not None:
            config.task_type, config.modules_to_save = TaskType.SEQ_CLS, [HEAD]
            tensors |= {f"base_model.model.{HEAD}.{name}": tensor for name, tensor in self.score.state_dict().items()}
        config.base_model_name_or_path = str(self.get_base_model().config.name_or_path)  # pyright: ignore
        config.inference_mode = True
        config.save_pretrained(str(directory))
        whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(whole, directory / "adapter_model.safetensors", metadata={"format": "pt"})


def owner(parameter: str) -> str | None:
    """The role whose adapter or head a parameter is; None: the base's."""
    found = OF_ONE_ROLE.search(parameter)
    return next(filter(None, found.groups())) if found else None


def scalar_linear(weights: Mapping[str, Tensor], dtype: torch.dtype) -> nn.Linear:
    """A scalar head of its own storage from `weight` and perhaps `bias`."""
    head = nn.Linear(weights["weight"].shape[1], 1, bias="bias" in weights, dtype=dtype)
    head.load_state_dict(weights)
    return head
