"""Packages that some slow tests check against, each in a folder of its own beside this environment's torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ENGINE = ("transformer_engine==2.20.2", "onnxscript", "onnx", "onnx-ir", "ml_dtypes", "nvdlfw_inspect", "einops")


def installed(packages: tuple[str, ...], folder: Path) -> Path:
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *packages]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{packages[0]} cannot be installed here: {done.stderr.splitlines()[-1:]}")
    return folder


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(("megatron-core==0.16.1",), tmp_path_factory.mktemp("megatron-core"))


@pytest.fixture(scope="session")
def transformer_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer Engine's pure-Python wheel, and what it imports."""
    return installed((*ENGINE, "importlib_metadata", "zipp"), tmp_path_factory.mktemp("transformer-engine"))
