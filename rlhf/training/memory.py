"""What a run needs of each process's memory, said before it trains: what follows from the sizes, without activations."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import torch
from torch import nn

from rlhf.errors import CheckFailed, OutOfMemory
from rlhf.training.engines import Engine
from rlhf.training.optimization import MOMENTS

if TYPE_CHECKING:
    from rlhf.training.session import Training

UNEVEN = 0.25
"""Small tensors do not divide evenly: by so much of the whole may a rank's part be larger than its share."""


def memory_line(policy: nn.Module, frozen: Sequence[nn.Module], engine: Engine, world_size: int) -> str:
    """In words. Tensors that several roles share count once."""
    mine = shares(state_bytes(policy, *frozen), engine.divided, world_size)
    parts = ", ".join(
        f"{name} {size / 1e9:.2f}" + (f" (1/{world_size})" if name in engine.divided else "") for name, size in mine.items()
    )
    actor = getattr(policy, "actor", None)
    sampling = f"; a rollout gathers {bytes_of(actor.parameters()) / 1e9:.2f}" if actor and "weights" in engine.divided else ""
    return f"memory of each process in GB: {parts}; together {sum(mine.values()) / 1e9:.2f}, and activations{sampling}"


def require_memory(train: Training) -> None:
    """Raises OutOfMemory where there is no room for what is sure to come; called before the engine takes the policy over.

    On a CPU all processes of the machine share it. Activations are not known and so not counted: nothing that fits is refused.
    """
    needed = still_needed(train.policy, train.engine, train.world_size, train.device)
    pool = train.peers[train.rank].reach if train.device.type == "cpu" else train.rank
    asked = [size for of, size in train.gather((pool, sum(needed.values()))) if of == pool]
    room = available(train.device)  # all have loaded their models, and none goes on before all have looked
    parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in needed.items() if size > 0)
    sharing = f" for each of {len(asked)} processes" if len(asked) > 1 else ""
    told = train.gather(
        f"rank {train.rank}: training needs at least {sum(asked) / 1e9:.2f} GB more ({parts}{sharing}; and activations), of "
        f"which {train.device.type} has {room / 1e9:.2f} GB available\n"
        "train fewer weights (lora.rank, frozen_layers; in PPO roles.mode adapters or shared), or divide gradients and "
        "optimizer among more processes (--launch zero2, zero3 or fsdp)"
        if sum(asked) > room
        else None
    )
    for refusal in filter(None, told):
        raise OutOfMemory(refusal)


def still_needed(policy: nn.Module, engine: Engine, world_size: int, device: torch.device) -> dict[str, float]:
    """Bytes on the device that this process has yet to take, by what for; weights that it will give up count against it."""
    parameters = list(policy.parameters())
    needed = shares(state_bytes(policy), engine.divided, world_size)
    needed["weights"] -= bytes_of(p for p in parameters if p.device.type == device.type)
    elsewhere = engine.offloaded if device.type != "cpu" else frozenset()
    return {name: size for name, size in needed.items() if name not in elsewhere}


def available(device: torch.device) -> float:
    """Bytes that processes may still take: on a GPU, or of the machine's memory and swap within its control groups' limits."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    swap = psutil.swap_memory().free
    return min(psutil.virtual_memory().available, *_room_in_groups()) + swap


def _room_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """What each control group around this process leaves, where one sets a limit; pages of files make way.

    Source: the kernel's Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. In a container's own namespace the
    paths of the host do not exist, and the root is the container's group.
    """
    yield float("inf")
    for line in own.read_text().splitlines() if own.exists() else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, limit_file, usage_file, prefix = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif not controllers:
            top, limit_file, usage_file, prefix = root, "memory.max", "memory.current", ""
        else:
            continue
        place = top / path.lstrip("/")
        for group in (place, *place.parents):
            if not group.is_relative_to(top):
                break
            limit = group / limit_file
            if limit.exists() and (most := limit.read_text().strip()) != "max":
                stat = dict(re.findall(r"^(\w+) (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE))
                files = sum(int(stat.get(f"{prefix}{kind}_file", 0)) for kind in ("active", "inactive"))
                yield int(most) - int((group / usage_file).read_text()) + files


def require_divided(engine: Engine, world_size: int) -> None:
    """Raises CheckFailed where ranks should divide something among them and do not."""
    held, whole = engine.held()
    if held > whole * (1 / world_size + UNEVEN):
        raise CheckFailed(f"{engine.name}: this process holds {held:,} of {whole:,} elements that {world_size} should divide")


def state_bytes(policy: nn.Module, *frozen: nn.Module) -> dict[str, float]:
    """Bytes of all weights, and of the policy's gradients and AdamW moments, which are of the weights' own dtype: in float32
    4 + 4 + 8 for each that is trained and 4 for each that is not. Tensors that several models share count once."""
    trained = bytes_of(parameter for parameter in policy.parameters() if parameter.requires_grad)
    weights = bytes_of(parameter for model in (policy, *frozen) for parameter in model.parameters())
    return {"weights": weights, "gradients": trained, "optimizer": len(MOMENTS) * trained}


def shares(whole: Mapping[str, float], divided: frozenset[str], world_size: int) -> dict[str, float]:
    """What one process has of it."""
    return {name: size / world_size if name in divided else size for name, size in whole.items()}


def bytes_of(parameters: Iterable[nn.Parameter]) -> int:
    """Tensors that come twice count once; on the meta device they have a size, too."""
    return sum(p.numel() * p.element_size() for p in {id(p): p for p in parameters}.values())
