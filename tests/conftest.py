"""What every test needs to hold before torch or the Hugging Face libraries are imported: no network, one thread.

Child processes inherit the environment, so the stages run under the same rules.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import apart
import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# Sums in one order give one result; and at test sizes a second thread only spins (both cores are busier without it).
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
# A picture drawn in a test opens no window.
os.environ["MPLBACKEND"] = "Agg"

TRANSFORMER_ENGINE = ("transformer_engine==2.20.2", "onnxscript", "onnx", "onnx-ir", "ml_dtypes", "nvdlfw_inspect", "einops")


@pytest.fixture(scope="session")
def transformer_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pure-Python wheel, and what that imports, in a folder of their own."""
    folder = tmp_path_factory.mktemp("transformer-engine")
    return apart.install(folder, *TRANSFORMER_ENGINE, "importlib_metadata", "zipp")


@pytest.fixture
def nothing_is_left() -> Iterator[None]:
    """What a trainer of TRL settles for its whole process is not for the stages that later tests fork from it."""
    before = dict(os.environ)
    yield
    from accelerate.state import AcceleratorState

    os.environ.clear()
    os.environ.update(before)
    AcceleratorState._reset_state(reset_partial_state=True)
