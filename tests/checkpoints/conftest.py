"""Packages that some slow tests check against, each in a folder of its own beside this environment's torch."""

from __future__ import annotations

from pathlib import Path

import apart
import pytest


@pytest.fixture(scope="session")
def megatron_core(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apart.install(tmp_path_factory.mktemp("megatron-core"), "megatron-core==0.16.1")
