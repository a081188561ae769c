"""Stand-ins for CUDA and for Transformer Engine's compiled extension, for drivers that build the real classes on a CPU.

Transformer Engine needs `python -O` (it checks its enumerations against the extension's) and NVTE_PROJECT_BUILDING=1.
"""

from __future__ import annotations

import enum
import re
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode


def without_cuda() -> None:
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.set_device = lambda *_: None
    torch.cuda.synchronize = lambda *_: None
    torch.cuda.get_device_capability = lambda *_: (8, 0)
    torch.cuda.get_device_properties = lambda *_: MagicMock(major=8, minor=0)
    torch.cuda.get_rng_state = lambda *_: torch.get_rng_state()
    torch.cuda.Stream = torch.cuda.Event = MagicMock
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self


class OnCpu(TorchFunctionMode):
    """Every device that is asked for is the CPU."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        options = dict(options or {})
        if "device" in options and options["device"] is not None:
            options["device"] = "cpu"
        return function(*arguments, **options)


class StandIn(types.ModuleType):
    """A compiled module: anything asked of it is a mock."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        found = MagicMock(name=name)
        setattr(self, name, found)
        return found


def without_kernels() -> None:
    """Transformer Engine imports, believing in a GPU."""
    import transformer_engine.common as common

    extension = StandIn("transformer_engine_torch")
    constants = Path(common.__file__).parents[1] / "pytorch" / "constants.py"
    extension.DType = _numbered("DType", re.findall(r"^    (k\w+) = int\(tex\.DType", constants.read_text(), re.M))
    for kind, tensors in (("FP8FwdTensors", ("INPUT", "WEIGHT", "OUTPUT")), ("FP8BwdTensors", ("GRAD_OUTPUT", "GRAD_INPUT"))):
        forward = [f"GEMM{gemm}_{tensor}" for gemm in (1, 2, 3) for tensor in tensors]
        backward = [f"{tensor}{gemm}" for gemm in (1, 2, 3) for tensor in tensors]
        setattr(extension, kind, _numbered(kind, forward if "Fwd" in kind else backward))
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


def _numbered(name: str, members: list[str]) -> type[enum.IntEnum]:
    return enum.IntEnum(name, {member: number for number, member in enumerate(members)})
