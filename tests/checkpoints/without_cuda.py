"""Stand-ins for Transformer Engine's compiled extension and for CUDA, so that its real Python classes are built on any machine.

For programs run with `python -O`, NVTE_PROJECT_BUILDING=1 and the pure-Python wheel of Transformer Engine 2.20 on the path.
Nothing is computed.
"""

from __future__ import annotations

import enum
import re
import sys
import types
from pathlib import Path
from unittest import mock

import torch
import torch._dynamo
import transformer_engine.common as common


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
