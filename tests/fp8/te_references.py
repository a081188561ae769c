"""Run like real_te.py: counts where our scales and codes differ from those of Transformer Engine's reference quantizer in pure
torch (pytorch/custom_recipes/reference_current_scaling.py). Its wheel has none for blocks: it is given one tile at a time.
"""

from __future__ import annotations

import itertools
import json

import torch
from without_gpu import without_kernels

without_kernels()

from transformer_engine.pytorch.custom_recipes import reference_current_scaling as theirs  # noqa: E402

from rlhf.fp8.formats import E4M3, E5M2  # noqa: E402
from rlhf.fp8.scaling import encode_tiles, scale_of  # noqa: E402

KINDS = {"fp32": False, "power_of_two": True}


def unlike_scales(format, kind: str) -> tuple[int, int]:
    spread = torch.randn(20000).abs() * 2.0 ** torch.randint(-60, 60, (20000,))
    amax = torch.cat([spread, torch.tensor([0.0, 1e-45, 1e-38, 1.0, 448.0, 57344.0, 3e38])])
    scale, *_ = theirs._scale_from_amax_tensor(torch.float32, amax, format.dtype, eps=0.0, pow_2_scales=KINDS[kind])
    return int((scale_of(amax, format, kind=kind) != scale).sum()), len(amax)


def unlike_tiles(format, kind: str, dtype: torch.dtype, tile: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    """Tiles of `tile` by theirs, of `other` by ours."""
    x = (torch.randn(150, 290) * 2.0 ** torch.randint(-8, 8, (150, 290))).to(dtype)
    codes, factors = encode_tiles(x, format, other, kind)
    quantizer = theirs.CurrentScalingQuantizerRef(format.dtype, pow_2_scales=KINDS[kind])
    unlike = 0
    for row, column in itertools.product(range(0, 150, tile[0]), range(0, 290, tile[1])):
        place = slice(row, row + tile[0]), slice(column, column + tile[1])
        expected = quantizer.quantize(x[place])
        unlike += int((codes[place].view(torch.uint8) != expected.data.view(torch.uint8)).sum())
        unlike += int(factors[row // other[0], column // other[1]] != expected.scale)
    return unlike, x.numel()


torch.manual_seed(0)
counts = {}
for format, kind in itertools.product((E4M3, E5M2), KINDS):
    counts[f"scale {format.name} {kind}"] = unlike_scales(format, kind)
    for dtype, tile in itertools.product((torch.float32, torch.bfloat16), ((1, 128), (128, 128), (1, 32))):
        counts[f"{format.name} {kind} {dtype} {tile}"] = unlike_tiles(format, kind, dtype, tile, tile)
counts["control"] = unlike_tiles(E4M3, "fp32", torch.float32, (1, 128), (1, 64))[0]
print(json.dumps(counts))
