"""The one model of all stages: an actor, a critic, or both, behind one forward.

DDP, ZeRO and FSDP hook the forward of the module they wrap and nothing else, so `ActorCritic.forward` is the only way in. SFT
trains one with an actor alone, the reward model stage one with a critic alone (a reward model and a critic are one class, read
at different positions), PPO one with both: on separate trunks, on a shared one, or as adapters on one base (adapters.py), which
has the frozen roles in it too.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

from torch import Tensor, nn

from rlhf.data.collate import TokenBatch
from rlhf.models.heads import HEAD


class Output(NamedTuple):
    """B rows; K positions, the last `batch.keep` or all L."""

    logits: Tensor | None
    """(B, K, V) of the actor's LM head"""
    values: Tensor | None
    """(B, K) of the critic's scalar head, of its own dtype"""


class ActorCritic(nn.Module):
    """`actor` is a `...ForCausalLM`, `critic` a `...ForSequenceClassification` (either may be a PEFT model around one).

    With `value_head` instead of `critic`, both heads stand on the actor's trunk and one pass through it serves both.
    """

    def __init__(
        self, actor: nn.Module | None = None, critic: nn.Module | None = None, value_head: nn.Linear | None = None
    ) -> None:
        super().__init__()
        self.actor, self.critic, self.value_head = actor, critic, value_head

    def forward(self, batch: TokenBatch, roles: tuple[str, ...] = ("actor", "critic")) -> Output:
        """Runs the roles asked for (and present); dropout is off, so training mode changes nothing but checkpointing."""
        logits = values = None
        if self.value_head is not None:
            logits, values = self._shared(batch)
        else:
            if "actor" in roles and self.actor is not None:
                logits = actor_logits(self.actor, batch)
            if "critic" in roles and self.critic is not None:
                values = scalar_values(self.critic, batch)
        return Output(logits, values)

    def part(self, role: str) -> nn.Module | None:
        """`actor` or `critic` as a model of its own, to be saved or looked into; None where it has no trunk of its own."""
        return self.actor if role == "actor" else self.critic

    def active(self, role: str) -> AbstractContextManager[None]:
        """In here the layers of `part(role)` compute that role."""
        return nullcontext()

    def weights_of(self, role: str) -> dict[str, Tensor]:
        """All that the forward of a role reads."""
        return self.state_dict()

    def _shared(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        assert self.actor is not None
        assert self.value_head is not None
        output = self.actor(**_inputs(batch), logits_to_keep=batch.keep, output_hidden_states=True)
        hidden = output.hidden_states[-1][:, -batch.keep :]  # the LM head's own input: after the final norm
        return output.logits, self.value_head(hidden).squeeze(-1)


def role_of(parameter: str) -> str:
    """Whose a parameter of a policy is, by its name: `actor` or `critic` (a shared trunk's value head is the critic's)."""
    parts = parameter.split(".")
    return "actor" if parts[0] == "actor" and "critic" not in parts else "critic"  # adapters share the actor's layers


def actor_logits(model: nn.Module, batch: TokenBatch) -> Tensor:
    """(B, K, V)"""
    return model(**_inputs(batch), logits_to_keep=batch.keep).logits


def scalar_values(model: nn.Module, batch: TokenBatch, head: nn.Module | None = None) -> Tensor:
    """(B, K): the scalar head at every kept position, not only at the last as transformers' own forward has it.

    Args:
        head: in place of the model's own.
    """
    model = unwrapped(model)
    read: nn.Module = getattr(model, HEAD) if head is None else head  # pyright: ignore[reportAssignmentType]
    trunk = getattr(model, model.base_model_prefix)  # pyright: ignore[reportArgumentType, reportCallIssue]
    hidden = trunk(**_inputs(batch)).last_hidden_state[:, -batch.keep :]
    return read(hidden).squeeze(-1)


def value_head_for(actor: nn.Module) -> nn.Linear:
    """A zero scalar head for the actor's trunk: a reward head would not fit a trunk it was not trained with."""
    embedding = unwrapped(actor).get_output_embeddings().weight  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    head = nn.Linear(embedding.shape[1], 1, bias=False, device=embedding.device, dtype=embedding.dtype)
    nn.init.zeros_(head.weight)
    return head


def unwrapped(model: nn.Module) -> nn.Module:
    """The Hugging Face module inside a PEFT wrapper (its layers carry the adapters), or the module itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model  # pyright: ignore


def _inputs(batch: TokenBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
        "use_cache": False,
    }
