"""Run with `python -O` and the pure-Python wheel of Transformer Engine 2.20 on the path: prints the names and shapes of the
state dict of its real TransformerLayer. Its compiled extension and CUDA are answered by stand-ins; nothing is computed.
"""

from __future__ import annotations

import enum
import json
import re
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
import transformer_engine.common as common

HIDDEN, MLP, HEADS, GROUPS = map(int, sys.argv[1:5])


def numbered(name: str, members: list[str]) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: number for number, member in enumerate(members)})


class StandIn(types.ModuleType):
    """A compiled module: anything asked of it is a mock."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = mock.MagicMock(name=name)
        setattr(self, name, found)
        return found


def without_cuda() -> None:
    extension = StandIn("transformer_engine_torch")
    constants = Path(common.__file__).parents[1] / "pytorch" / "constants.py"
    extension.DType = numbered("DType", re.findall(r"^    (k\w+) = int\(tex\.DType", constants.read_text(), re.M))
    for kind, tensors in (("FP8FwdTensors", ("INPUT", "WEIGHT", "OUTPUT")), ("FP8BwdTensors", ("GRAD_OUTPUT", "GRAD_INPUT"))):
        forward = [f"GEMM{gemm}_{tensor}" for gemm in (1, 2, 3) for tensor in tensors]
        backward = [f"{tensor}{gemm}" for gemm in (1, 2, 3) for tensor in tensors]
        setattr(extension, kind, numbered(kind, forward if "Fwd" in kind else backward))
    extension.get_cudnn_version = lambda: 91900
    extension.get_num_cublas_streams = lambda: 4
    common.load_framework_extension = lambda _: sys.modules.update(transformer_engine_torch=extension)
    triton = "transformer_engine.pytorch.triton"
    for name in (
        triton,
        *(f"{triton}.{part}" for part in ("pad", "mhc", "permutation", "cross_entropy", "grouped_dbias_dscales")),
    ):
        sys.modules[name] = StandIn(name)
        sys.modules[name].__path__ = []
    torch.cuda.is_available = lambda: True
    torch.cuda.get_device_capability = lambda *_: (9, 0)
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, name="H100", total_memory=80 << 30
    )
    torch.cuda.current_device = lambda: 0
    torch.cuda.device_count = lambda: 1


def main() -> None:
    without_cuda()
    import transformer_engine.pytorch as engine

    layer = engine.TransformerLayer(
        HIDDEN,
        MLP,
        HEADS,
        num_gqa_groups=GROUPS,
        bias=False,
        normalization="RMSNorm",
        activation="swiglu",
        fuse_qkv_params=True,
        attn_input_format="bshd",
        self_attn_mask_type="causal",
        device="meta",
    )
    state = layer.state_dict()
    print(json.dumps({key: list(value.shape) for key, value in state.items() if not key.endswith("_extra_state")}))


if __name__ == "__main__":
    main()
