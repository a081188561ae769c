"""The one model of all stages: an actor, a critic, or both, behind one forward.

DDP, ZeRO and FSDP hook the forward of the module they wrap and nothing else, so `ActorCritic.forward` is the only way in. SFT
trains one with an actor alone, the reward model stage one with a critic alone (a reward model and a critic are one class, read
at different positions), PPO one with both: on separate trunks, on a shared one, or as adapters on one base (adapters.py), which
has the frozen roles in it too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf.data.collate import TokenBatch
from rlhf.models.frozen import FrozenLower
from rlhf.models.heads import HEAD
from rlhf.models.trunk import Trunk


class Output(NamedTuple):
    """At the K places a batch is read at."""

    logprobs: Tensor | None
    """(K,) of the batch's targets under the actor, float32 or float64"""
    values: Tensor | None
    """(K,) of the critic's scalar head, of its own dtype"""
    entropy: Tensor | None = None
    """(K,) of the actor's distribution, in nats, where it was asked for"""


class ActorCritic(nn.Module):
    """`actor` is a `...ForCausalLM`, `critic` a `...ForSequenceClassification` (either may be a PEFT model around one).

    With `value_head` instead of `critic`, both heads stand on the actor's trunk and one pass through it serves both.
    """

    def __init__(
        self, actor: nn.Module | None = None, critic: nn.Module | None = None, value_head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.actor, self.critic, self.value_head = actor, critic, value_head
        self.lower: dict[str, FrozenLower] = {}
        """By role: the frozen layers it has in common with other roles."""

    def forward(
        self,
        batch: TokenBatch,
        roles: tuple[str, ...] = ("actor", "critic"),
        temperature: float = 1.0,
        entropy: bool = False,
    ) -> Output:
        """Runs the roles asked for (and present); dropout is off, so training mode changes nothing but checkpointing."""
        logprobs = values = entropies = None
        if self.actor is not None and ("actor" in roles or self.value_head is not None):
            trunk = Trunk(unwrapped(self.actor), batch, self.lower.get("actor"))
            logprobs, entropies = told_by(trunk, temperature, entropy)
            if self.value_head is not None:
                values = self.value_head(trunk.hidden).squeeze(-1)
        if self.critic is not None and "critic" in roles:
            critic = unwrapped(self.critic)
            values = getattr(critic, HEAD)(Trunk(critic, batch, self.lower.get("critic")).hidden).squeeze(-1)
        return Output(logprobs, values, entropies)

    def part(self, role: str) -> nn.Module | None:
        """`actor` or `critic` as a model of its own, to be saved or looked into; None where it has no trunk of its own."""
        return self.actor if role == "actor" else self.critic

    def active(self, role: str) -> AbstractContextManager[None]:
        """In here the layers of `part(role)` compute that role."""
        return nullcontext()

    def weights_of(self, role: str) -> dict[str, Tensor]:
        """All that the forward of a role reads."""
        return self.state_dict()


def told_by(trunk: Trunk, temperature: float, entropy: bool) -> tuple[Tensor, Tensor | None]:
    """(log-probabilities, entropy or None) of an actor's trunk."""
    return trunk.logprobs_and_entropy(temperature) if entropy else (trunk.logprobs(temperature), None)


def role_of(parameter: str) -> str:
    """Whose a parameter of a policy is, by its name: `actor` or `critic` (a shared trunk's value head is the critic's)."""
    parts = parameter.split(".")
    return "actor" if parts[0] == "actor" and "critic" not in parts else "critic"  # adapters share the actor's layers


def value_head_for(actor: nn.Module) -> nn.Linear:
    """A zero scalar head for the actor's trunk: a reward head would not fit a trunk it was not trained with."""
    embedding = unwrapped(actor).get_output_embeddings().weight  # pyright: ignore[reportOptionalMemberAccess]
    head = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=embedding.dtype)
    nn.init.zeros_(head.weight)
    return head


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face module inside a PEFT wrapper (its layers carry the adapters), or the module itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # pyright: ignore
