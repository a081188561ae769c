"""What one process needs, in bytes, from sizes alone: state under an engine, caches and buffers of a rollout. All are pure."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.config.engines import Engine
from rlhf.rollout.cache import ROOM
from rlhf.training.memory import shares

FLOAT, HALF, DOUBLE, LONG = 4, 2, 8, 8
"""Bytes of a float32, a bfloat16, a float64 and an int64."""

NF4_BYTES = 4.127 / 8
"""Of a weight in 4 bits with double quantisation (Dettmers et al. 2023, arXiv:2305.14314, section 3)."""

FP8_COPIES = 2
"""Bytes that FP8 keeps of a weight beside the float32 one: it in FP8, and that transposed, for the products of the backward."""

EXPERIENCE_TENSORS = 8
"""Numbers in float32 that an iteration has of each token: two kinds of log-probability, the reference's, value, reward,
advantage, return and weight (rlhf/rollout/experience.py); beside them its id and mask, int64."""


def state_needs(whole: Mapping[str, float], trained: float, engine: Engine, processes: int) -> tuple[dict[str, float], float]:
    """(on the device, on the host) of weights, gradients and optimizer, and of what the engine keeps beside them.

    Args:
        whole: bytes of `weights`, `gradients` and `optimizer` in one process (memory.state_bytes).
        trained: bytes of the weights that are trained.

    DDP exchanges gradients through buckets as large as they are (torch's DistributedDataParallel without
    gradient_as_bucket_view). ZeRO steps a float32 copy of each process's part of the weights (`single_partition_of_fp32_groups`
    and `fp32_partitioned_groups_flat` in DeepSpeed), which lies where the moments do, and exchanges gradients through a buffer
    of `reduce_bucket_size` elements.
    """
    needs = shares(whole, engine.divided, processes)
    if processes > 1 and engine.name == "ddp":
        needs["exchange"] = trained
    if engine.name.startswith("zero"):
        needs["engine's copy"] = trained / processes
        needs["exchange"] = FLOAT * engine.bucket
    away = engine.offloaded | ({"engine's copy"} if "optimizer" in engine.offloaded else frozenset())
    return {name: size for name, size in needs.items() if name not in away}, sum(needs[name] for name in away if name in needs)


def kv_bytes_per_token(layers: int, key_value_heads: int, head_width: int, element: int) -> int:
    """Keys and values of all layers."""
    return 2 * layers * key_value_heads * head_width * element


def cache_columns(prompt: int, reply: int) -> int:
    """Columns that a SlotCache has at the end of replies of `reply` tokens, all begun together (rlhf/rollout/cache.py)."""
    columns = end = prompt
    for seen in range(prompt, prompt + reply):
        if end == columns:
            end, columns = seen, seen + min(reply, max(ROOM, seen // 8))
        end += 1
    return columns


def kv_cache_bytes(rows: int, prompt: int, reply: int, per_token: int, layers: int) -> float:
    """Of `rows` replies sampled together: the whole cache, and of one layer's keys the copy that it grows from. While prompts
    join, the cache and what it is filled from."""
    columns = cache_columns(prompt, reply)
    grown = rows * per_token * (columns + columns / (2 * layers))
    return max(grown, rows * per_token * 2 * prompt)


def sampling_bytes(rows: int, vocabulary: int, element: int) -> int:
    """Of drawing one token of each row: its logits as they come and joined, in float32 over the temperature, exponentials, and
    their float64 sums (rlhf/rollout/sampling.py)."""
    return rows * vocabulary * (2 * element + 2 * FLOAT + DOUBLE)


def experience_bytes(replies: int, reply: int) -> int:
    """Of an iteration's rollout, on the host: what this process computes and what it gets from all, at once."""
    return 2 * replies * reply * (EXPERIENCE_TENSORS * FLOAT + 2 * LONG)
