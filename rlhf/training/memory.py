"""What a run needs of each process's memory, said before it trains: what follows from the sizes, without activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from rlhf.errors import CheckFailed
from rlhf.training.engines import Engine
from rlhf.training.optimization import MOMENTS

UNEVEN = 0.25
"""Small tensors do not divide evenly: by so much of the whole may a rank's part be larger than its share."""


def memory_line(policy: nn.Module, frozen: Sequence[nn.Module], engine: Engine, world_size: int) -> str:
    """In words. Tensors that several roles share count once."""
    weights = _bytes(parameter for model in (policy, *frozen) for parameter in model.parameters())
    trained = _bytes(parameter for parameter in policy.parameters() if parameter.requires_grad)
    whole = {"weights": weights, "gradients": trained, "optimizer": len(MOMENTS) * trained}
    mine = {name: size / world_size if name in engine.divided else size for name, size in whole.items()}
    parts = ", ".join(
        f"{name} {size / 1e9:.2f}" + (f" (1/{world_size})" if name in engine.divided else "") for name, size in mine.items()
    )
    actor = getattr(policy, "actor", None)
    sampling = f"; a rollout gathers {_bytes(actor.parameters()) / 1e9:.2f}" if actor and "weights" in engine.divided else ""
    return f"memory of each process in GB: {parts}; together {sum(mine.values()) / 1e9:.2f}, and activations{sampling}"


def require_divided(engine: Engine, world_size: int) -> None:
    """Raises CheckFailed where ranks should divide something among them and do not."""
    held, whole = engine.held()
    if held > whole * (1 / world_size + UNEVEN):
        raise CheckFailed(f"{engine.name}: this process holds {held:,} of {whole:,} elements that {world_size} should divide")


def _bytes(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
