"""Our te layers on Transformer Engine's real Python classes (no kernel is run), and our rounding against its own references."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import apart
import pytest

DRIVER, REFERENCES = Path(__file__).with_name("real_te.py"), Path(__file__).with_name("te_references.py")
RECIPES: dict[str, dict[str, Any]] = {
    "delayed": {"recipe": "delayed", "margin": 1, "amax_history": 16, "amax_algorithm": "most_recent"},
    "current": {"recipe": "current"},
    "current e4m3": {"recipe": "current", "format": "e4m3"},
    "block": {"recipe": "block"},
    "block fp32": {"recipe": "block", "block_scales": "fp32", "high_precision": ["dgrad", "wgrad"]},
    "mxfp8": {"recipe": "mxfp8", "format": "hybrid"},
}
CLASSES = {
    "delayed": ("DelayedScaling", "HYBRID", None),
    "current": ("Float8CurrentScaling", "HYBRID", None),
    "current e4m3": ("Float8CurrentScaling", "E4M3", None),
    "block": ("Float8BlockScaling", "E4M3", None),
    "block fp32": ("Float8BlockScaling", "E4M3", "high_precision"),
    "mxfp8": ("MXFP8BlockScaling", "HYBRID", None),
}
TOKENS = {"delayed": (20, 32), "current": (16, 16), "block": (20, 128), "mxfp8": (33, 64)}
"""Given, and after the padding."""
CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "bias": ("parameters", {"bias": True}),
    "no bias": ("parameters", {"bias": False}),
    "delayed": ("delayed", {}),
    "model": ("model", {}),
    "keep": ("refused", {"fp8": {"recipe": "block"}, "keep": ["wgrad"]}),
    "keep both": ("refused", {"fp8": {"recipe": "block"}, "keep": ["dgrad", "wgrad"]}),
    "32": ("refused", {"fp8": {"recipe": "mxfp8"}, "keep": [], "width": 48}),
    "128": ("refused", {"fp8": {"recipe": "block"}, "keep": [], "width": 144}),
    **{f"fields {name}": ("recipe_fields", {"fp8": fp8}) for name, fp8 in RECIPES.items()},
    **{f"quantizers {name}": ("quantizers", {"fp8": fp8}) for name, fp8 in RECIPES.items()},
    **{f"forward {name}": ("forward", {"fp8": RECIPES[name], "tokens": given}) for name, (given, _) in TOKENS.items()},
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(transformer_engine: Path) -> dict[str, Any]:
    # the variable would make powers of two of our exact scales, were they left to Transformer Engine's defaults
    settings = {"NVTE_PROJECT_BUILDING": "1", "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES": "1"}
    return apart.run(DRIVER, transformer_engine, json.dumps(CALLS), flags=("-O",), **settings)


@pytest.mark.parametrize(("case", "keys"), [("bias", ["weight", "bias"]), ("no bias", ["weight"])])
def test_parameters_are_shared_and_nothing_else_is_in_the_state_dict(found: dict[str, Any], case: str, keys: list[str]) -> None:
    loads = "<All keys matched successfully>"
    assert found[case] == {"keys": keys, "same": True, "frozen": True, "is te.Linear": True, "loads": loads}


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_of_a_recipe_is_taken(found: dict[str, Any], name: str) -> None:
    kind, format, override = CLASSES[name]
    expected = {"class": kind, "unknown": [], "not taken": [], "format": format, "backward_override": override}
    assert found[f"fields {name}"] == expected


def test_kinds_of_scale(found: dict[str, Any]) -> None:
    assert found["quantizers block"] == [[True, 1], [True, 2], [True, 1]]  # 1 x 128, 128 x 128, 1 x 128
    assert found["quantizers block fp32"] == [[False, 1], [False, 2], [False, 1]]
    assert found["quantizers current"] == [[False, None]] * 3


def test_delayed_scales_are_ours(found: dict[str, Any]) -> None:
    seen = found["delayed"]
    assert seen["scales"] == [448 / 8, 448 / 2, 57344 / 0.5]
    # row 0 was moved to the end; what a pass without gradients sees is not recorded
    assert seen["history"] == [[0, 0, 0], [0, 0, 0], [0, 0, 0], [8, 2, 0.5]]
    assert seen["moved by Transformer Engine"] == [0, 2]  # a plain te.Linear: scales of forward and backward
    assert seen["keys"] == ["weight", "bias"]
    assert seen["state"] == [".amax_history", ".scale"]


@pytest.mark.parametrize("name", TOKENS)
def test_a_forward_is_a_padded_region_of_its_own(found: dict[str, Any], name: str) -> None:
    seen, (_, padded) = found[f"forward {name}"], TOKENS[name]
    assert seen["tokens"] == padded
    assert seen["inside"]
    assert not seen["after"]
    assert seen["off"] < 1e-6
    if name == "delayed":  # no history yet: the first tensors' own magnitude, a power of two below it for the margin
        expected = [largest / 2 / amax for largest, amax in zip((448, 448, 57344), seen["largest"], strict=True)]
        assert seen["scales"] == pytest.approx(expected, rel=1e-6)
        assert seen["anew"] == pytest.approx(expected, rel=1e-6)  # set to none by a load, they are found again


def test_into_a_model_and_out(found: dict[str, Any]) -> None:
    said = "2 linear layers in FP8, recipe current, backend te"
    assert found["model"]["said"].startswith(said)
    assert found["model"]["same"]
    assert found["model"]["undone"] == ["Linear", "Linear"]


def test_what_it_cannot_do_is_said(found: dict[str, Any]) -> None:
    assert found["keep"].startswith("fp8.keep: wgrad in high precision")
    assert found["keep both"] == ""
    assert "(128, 48), no multiples of 32" in found["32"]
    assert "(128, 144), no multiples of 128" in found["128"]


def test_numbers_are_those_of_its_references(transformer_engine: Path) -> None:
    counts = apart.run(REFERENCES, transformer_engine, flags=("-O",), NVTE_PROJECT_BUILDING="1")
    assert counts.pop("control") > 0  # tiles of another width
    assert sum(compared for _, compared in counts.values()) > 100_000
    assert {case: unlike for case, (unlike, _) in counts.items() if unlike} == {}
