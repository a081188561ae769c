"""Weights stored in FP8 with a scale for each block, to BF16 and back.

Source: DeepSeek-V3, inference/fp8_cast_bf16.py: `X.weight` in E4M3 and `X.weight_scale_inv`, one FP32 factor for each block of
128 x 128 (the last of a row or column may be smaller); a weight is its code times its block's factor.

What is written is more careful than what is read: inference engines (transformers 5.23, vLLM) want whole blocks, and matrices
they fuse in one precision.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlhf.checkpoints.hugging_face import lay_out_as_named
from rlhf.checkpoints.plan import Target
from rlhf.checkpoints.stored import Stored, derived
from rlhf.errors import DataError
from rlhf.fp8.formats import E4M3
from rlhf.fp8.scaling import encode_tiles

BLOCK = 128
SCALE = "_scale_inv"
IN_FP8 = re.compile(r"\.(layers|h|blocks)\.\d+\..*\.weight$")
KEPT = re.compile(r"norm|ln_|embed|router|(mlp|block_sparse_moe)\.gate\.weight$|shared_expert_gate")
TRANSPOSED = ("gpt2",)
"""Families of transformers whose matrices lie the other way round (Conv1D), which no engine reads in FP8."""
FUSED = (
    (re.compile(r"\b(?:q|k|v)_proj\.weight$"), "qkv_proj"),
    (re.compile(r"\b(?:gate|up)_proj\.weight$"), "gate_up_proj"),
    (re.compile(r"\.experts\..*"), ".experts"),
)
"""Matrices that engines hold as one, and what that is called; they have one precision."""


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """BF16 weights (R, C) from E4M3 codes (R, C) and their factors (ceil(R / block), ceil(C / block))."""
    rows, columns = codes.shape
    if tuple(scales.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        raise RuntimeError(f"{rows} x {columns} codes in blocks of {block} do not take {tuple(scales.shape)} factors")
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (codes.float() * spread).bfloat16()


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(E4M3 codes, FP32 factors) of weights (R, C).

    Factors are powers of two, as in recipe `block`: a model trained in it computes with the very numbers stored here, and
    BF16 holds each of them exactly.
    """
    return encode_tiles(weight, E4M3, (BLOCK, BLOCK), "power_of_two")


def plan_bf16(tensors: Mapping[str, Stored], config: Mapping[str, Any], shard_bytes: int) -> tuple[Target, dict[str, Any]]:
    """Every block-scaled weight as BF16, all else as it is.

    Raises:
        DataError: a weight or its factors are missing, or the config says other blocks than it has.
    """
    told = config.get("quantization_config") or {}
    rows, columns = told.get("weight_block_size") or (BLOCK, BLOCK)
    plain: dict[str, Stored] = {}
    for key, stored in tensors.items():
        if key.endswith(SCALE):
            if key.removesuffix(SCALE) not in tensors:
                raise DataError(f"{stored.origins[0]}: the weight it belongs to is missing")
            if (other := tensors[key.removesuffix(SCALE)].dtype) != torch.float8_e4m3fn:
                raise DataError(f"{stored.origins[0]}: factors of a weight in {other}, expected torch.float8_e4m3fn")
        elif stored.dtype == torch.float8_e4m3fn:
            if key + SCALE not in tensors:
                raise DataError(f"{stored.origins[0]}: is FP8, and {key}{SCALE} is missing")
            take = partial(_pair, block=(rows, columns))
            plain[key] = derived([stored, tensors[key + SCALE]], take, "codes times the factor of their block")
        else:
            plain[key] = stored
    if len(plain) == len(tensors):
        raise DataError("--to bf16: no tensor is stored in FP8 with block factors; there is nothing to do")
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    return lay_out_as_named(plain, "Hugging Face, BF16", shard_bytes), {**config, "dtype": "bfloat16"}


def plan_fp8(tensors: Mapping[str, Stored], config: Mapping[str, Any], shard_bytes: int) -> tuple[Target, dict[str, Any]]:
    """The matrices inside the layers as E4M3 with block factors; embeddings, head, norms and routers stay as they are.

    So does a matrix whose blocks would not all be whole, and whatever is fused with it; config.json names what stays.

    Raises:
        DataError: no matrix can be stored so, or the model is in FP8 already.
    """
    if config.get("model_type") in TRANSPOSED:
        raise DataError(f"--to fp8: {config['model_type']} holds its matrices transposed (Conv1D); no engine reads that in FP8")
    if stored_so := [stored for stored in tensors.values() if stored.dtype == torch.float8_e4m3fn]:
        raise DataError(f"{stored_so[0].origins[0]}: is FP8 already; --to bf16 undoes that")
    matrices = {key: stored for key, stored in tensors.items() if len(stored.shape) == 2 and key.endswith(".weight")}
    plain = {_fused(key) for key, stored in matrices.items() if not _fits(key, stored.shape)}
    entries: dict[str, Stored] = {}
    for key, stored in tensors.items():
        if key in matrices and _fused(key) not in plain:
            entries[key] = derived([stored], lambda parts: quantised(parts[0])[0], "codes of each block")
            entries[key + SCALE] = derived([stored], lambda parts: quantised(parts[0])[1], "factors of each block")
        else:
            entries[key] = stored
    if len(entries) == len(tensors):
        raise DataError(f"--to fp8: no matrix inside the layers is a multiple of {BLOCK} x {BLOCK}; engines take no others")
    kept = sorted({_module(key) for key in matrices if _fused(key) in plain})
    about = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
        "modules_to_not_convert": kept,  # transformers' name for it
        "ignored_layers": kept,  # vLLM's
    }
    return lay_out_as_named(entries, "Hugging Face, FP8 in blocks", shard_bytes), {**config, "quantization_config": about}


def _fits(key: str, shape: tuple[int, ...]) -> bool:
    return bool(IN_FP8.search(key)) and not KEPT.search(key) and not any(size % BLOCK for size in shape)


def _fused(key: str) -> str:
    """The matrix of an engine that a matrix of ours goes into."""
    for parts, whole in FUSED:
        key = parts.sub(whole, key)
    return key


def _module(key: str) -> str:
    return re.sub(r"(\.experts)\..*", r"\1", key).removesuffix(".weight")


def _pair(parts: list[Tensor], block: tuple[int, int]) -> Tensor:
    return dequantised(parts[0], parts[1], block)
