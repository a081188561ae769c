"""The reference layer and torchao's agree, product by product; torchao's layer keeps the parameters it is given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apart
import pytest

DRIVER = Path(__file__).with_name("real_torchao.py")
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "current": ({"recipe": "current"}, "fp32"),
    "current e4m3": ({"recipe": "current", "format": "e4m3"}, "fp32"),
    "current, wgrad kept": ({"recipe": "current", "high_precision": ["wgrad"]}, "fp32"),
    "rowwise": ({"recipe": "rowwise"}, "fp32"),
    "rowwise hybrid": ({"recipe": "rowwise", "format": "hybrid"}, "fp32"),
    "rowwise, wgrad kept": ({"recipe": "rowwise", "high_precision": ["wgrad"]}, "fp32"),
    "powers of two": ({"recipe": "rowwise"}, "power_of_two"),
}
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "model": ("model", {}),
    "autocast": ("autocast", {"high_precision": []}),
    "autocast, wgrad kept": ("autocast", {"high_precision": ["wgrad"]}),
    "control": ("apart", {"fp8": {"recipe": "current"}, "kind": "fp32", "control": {"format": "e4m3"}}),
    "as on a GPU": ("apart", {"fp8": {"recipe": "current"}, "kind": "fp32", "control": {}, "as_on_gpu": True}),
    "rowwise as on a GPU": ("apart", {"fp8": {"recipe": "rowwise"}, "kind": "fp32", "control": {}, "as_on_gpu": True}),
    **{name: ("apart", {"fp8": fp8, "kind": kind, "control": {}}) for name, (fp8, kind) in CASES.items()},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = apart.install(tmp_path_factory.mktemp("torchao"), "torchao==0.18.0")
    return apart.run(DRIVER, folder, json.dumps(CALLS))


@pytest.mark.parametrize("name", CASES)
def test_products_agree(found: dict[str, Any], name: str) -> None:
    off = found[name]["off"]  # y, dx, dW, db
    assert max(off) < 1e-6
    if name == "powers of two":  # scaling is exact, and both sum in the same order
        assert off[:3] == [0, 0, 0]


@pytest.mark.parametrize(("name", "bound"), [("as on a GPU", 1e-6), ("rowwise as on a GPU", 2**-8)])
def test_the_path_of_a_gpu(found: dict[str, Any], name: str, bound: float) -> None:
    """torch's FP8 product, which a CPU has, too. Its rowwise one ends in bfloat16."""
    assert found[name]["summed over"] == [272, 144, 96]  # in, out, and the 90 tokens made a multiple of 16
    assert max(found[name]["off"]) < bound


def test_another_format_of_gradients_is_seen(found: dict[str, Any]) -> None:
    y, of_x, of_weight, _ = found["control"]["off"]
    assert y < 1e-6
    assert min(of_x, of_weight) > 1e-2


@pytest.mark.parametrize("name", ["autocast", "autocast, wgrad kept"])
def test_dtypes_under_autocast_are_those_of_a_linear_layer(found: dict[str, Any], name: str) -> None:
    assert found[name] == {"y": "torch.bfloat16", "dx": "torch.float32", "dW": "torch.float32"}


def test_into_a_model_and_out(found: dict[str, Any]) -> None:
    seen = found["model"]
    assert seen["said"].startswith("2 linear layers in FP8, recipe rowwise, backend torchao (emulated: no GPU)")
    assert seen["same"]
    assert seen["same keys"]
    assert seen["auto"] == "reference"
