"""Weights stored in FP8 with a scale for each block, to BF16 and back.

Source: DeepSeek-V3, inference/fp8_cast_bf16.py: `X.weight` in E4M3 and `X.weight_scale_inv`, one FP32 factor for each block of
128 x 128 (the last of a row or column may be smaller); a weight is its code times its block's factor.
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

BLOCK = 128
LARGEST = torch.finfo(torch.float8_e4m3fn).max
SCALE = "_scale_inv"
IN_FP8 = re.compile(r"\.(layers|h|blocks)\.\d+\..*\.weight$")
KEPT = re.compile(r"norm|ln_|embed|router|(mlp|block_sparse_moe)\.gate\.weight$|shared_expert_gate")


def dequantised(codes: Tensor, scales: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> Tensor:
    """BF16 weights (R, C) from E4M3 codes (R, C) and their factors (ceil(R / block), ceil(C / block))."""
    rows, columns = codes.shape
    if tuple(scales.shape) != (-(-rows // block[0]), -(-columns // block[1])):
        raise RuntimeError(f"{rows} x {columns} codes in blocks of {block} do not take {tuple(scales.shape)} factors")
    spread = scales.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (codes.float() * spread).bfloat16()


def quantised(weight: Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[Tensor, Tensor]:
    """(E4M3 codes, FP32 factors) of weights (R, C): each block's largest magnitude becomes the largest code."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -columns % block[1], 0, -rows % block[0]))
    blocks = padded.view(padded.shape[0] // block[0], block[0], padded.shape[1] // block[1], block[1])
    largest = blocks.abs().amax((1, 3))
    scales = torch.where(largest > 0, largest / LARGEST, torch.ones_like(largest))
    codes = (blocks / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return codes.view(padded.shape)[:rows, :columns].contiguous(), scales


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
        elif stored.dtype == torch.float8_e4m3fn:
            if key + SCALE not in tensors:
                raise DataError(f"{stored.origins[0]}: is FP8, and {key}{SCALE} is missing")
            take = partial(_pair, block=(rows, columns))
            how = "codes times the factor of their block"
            plain[key] = derived([stored, tensors[key + SCALE]], take, how, of_several_types=True)
        else:
            plain[key] = stored
    if len(plain) == len(tensors):
        raise DataError("--to bf16: no tensor is stored in FP8 with block factors; there is nothing to do")
    config = {name: value for name, value in config.items() if name != "quantization_config"}
    return lay_out_as_named(plain, "Hugging Face, BF16", shard_bytes), {**config, "dtype": "bfloat16"}


def plan_fp8(tensors: Mapping[str, Stored], config: Mapping[str, Any], shard_bytes: int) -> tuple[Target, dict[str, Any]]:
    """The matrices inside the layers as E4M3 with block factors; embeddings, head, norms and routers stay as they are."""
    entries: dict[str, Stored] = {}
    for key, stored in tensors.items():
        if IN_FP8.search(key) and not KEPT.search(key) and len(stored.shape) == 2:
            entries[key] = derived([stored], lambda parts: quantised(parts[0])[0], "codes of each block")
            entries[key + SCALE] = derived([stored], lambda parts: quantised(parts[0])[1], "factors of each block")
        else:
            entries[key] = stored
    about = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    return lay_out_as_named(entries, "Hugging Face, FP8 in blocks", shard_bytes), {**config, "quantization_config": about}


def _pair(parts: list[Tensor], block: tuple[int, int]) -> Tensor:
    return dequantised(parts[0], parts[1], block)
