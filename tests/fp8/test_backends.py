"""Which backend is chosen, and why another cannot be; without their packages, which stand-ins take the place of."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest
import torch
from torch import nn

from rlhf.config.sections import Fp8
from rlhf.errors import ConfigError
from rlhf.fp8.apply import apply, described
from rlhf.fp8.backends import BACKENDS, open_backend, te, torchao
from rlhf.fp8.recipes import recipe_of

RECIPES = ("delayed", "current", "block", "rowwise", "mxfp8")


def recipe(name: str, **settings):
    return recipe_of(Fp8(recipe=name, **settings))


@pytest.fixture
def machine(monkeypatch):
    """A GPU of a compute capability, with both packages found; what Transformer Engine says of it is up to the test."""

    def make(capability: tuple[int, int], able: tuple[bool, str] = (True, "")) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        for backend in (te, torchao):
            monkeypatch.setattr(backend, "find_spec", lambda _: True)
        engine = types.ModuleType("transformer_engine.pytorch")
        for check in set(te.SUPPORT.values()):
            setattr(engine, check, lambda return_reason: able)
        package = types.ModuleType("transformer_engine")
        package.pytorch = engine  # pyright: ignore
        float8 = types.ModuleType("torchao.float8")
        ao = types.ModuleType("torchao")
        ao.float8 = float8  # pyright: ignore
        for module in (engine, package, float8, ao):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    return make


def test_no_package_is_imported_before_it_is_asked_for():
    program = "import sys, rlhf.fp8.apply; print([one for one in ('transformer_engine', 'torchao') if one in sys.modules])"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.strip() == "[]"


@pytest.mark.parametrize("name", RECIPES)
def test_without_a_gpu_auto_is_the_reference(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torchao, "obstacle", lambda _: "")  # as where torchao is installed: it would emulate
    assert open_backend("auto", recipe(name)).name == "reference"


@pytest.mark.parametrize(
    ("name", "chosen"),
    [("delayed", "te"), ("current", "te"), ("block", "te"), ("rowwise", "torchao"), ("mxfp8", "te")],
)
def test_on_a_gpu_auto_is_the_first_that_can(machine, name, chosen):
    machine((9, 0))
    assert open_backend("auto", recipe(name)).name == chosen


def test_auto_goes_on_where_one_cannot(machine):
    machine((9, 0), able=(False, "cuBLAS is too old"))
    assert te.obstacle(recipe("block")) == "cuBLAS is too old"
    chosen = {name: open_backend("auto", recipe(name)).name for name in ("current", "block", "delayed")}
    assert chosen == {"current": "torchao", "block": "reference", "delayed": "reference"}
    model = nn.Sequential(nn.Linear(32, 32))
    apply(model, Fp8(recipe="block"))
    why = "te: cuBLAS is too old; torchao: torchao has current and rowwise only"
    assert f"backend reference, emulated and slower than BF16 ({why})" in described(model)
    machine((8, 0), able=(False, "too old"))
    assert open_backend("auto", recipe("current")).name == "reference"


@pytest.mark.parametrize(
    ("backend", "name", "settings", "why"),
    [
        ("te", "rowwise", {}, "no such recipe"),
        ("te", "current", {"margin": 1}, "fp8.margin"),
        ("te", "block", {"high_precision": ["wgrad"]}, "dgrad and wgrad, both or none"),
        ("te", "delayed", {"high_precision": ["dgrad", "wgrad"]}, "with delayed it leaves out no product"),
        ("te", "block", {"block_scales": "fp32"}, "powers of two only"),
        ("torchao", "block", {}, "current and rowwise only"),
        ("torchao", "delayed", {}, "current and rowwise only"),
        ("torchao", "current", {"margin": 1}, "fp8.margin"),
        ("torchao", "rowwise", {"high_precision": ["dgrad", "wgrad"]}, "wgrad only"),
    ],
)
def test_what_a_package_does_not_have(machine, backend, name, settings, why):
    machine((10, 0))
    assert why in BACKENDS[backend].obstacle(recipe(name, **settings))
    with pytest.raises(ConfigError, match=rf"fp8\.backend {backend} cannot do recipe {name} here: .*can: .*reference"):
        open_backend(backend, recipe(name, **settings))


def test_what_it_has(machine):
    machine((9, 0))
    assert te.obstacle(recipe("block", block_scales="fp32", high_precision=["dgrad", "wgrad"])) == ""
    assert te.obstacle(recipe("delayed", margin=2)) == ""
    assert torchao.obstacle(recipe("rowwise", format="hybrid", high_precision=["wgrad"])) == ""


def test_a_package_missing(machine, monkeypatch):
    machine((9, 0))
    for backend in (te, torchao):
        monkeypatch.setattr(backend, "find_spec", lambda _: None)
    assert te.obstacle(recipe("block")) == "Transformer Engine is not installed: pip install 'rlhf[fp8]'"
    assert torchao.obstacle(recipe("rowwise")) == "torchao is not installed: pip install 'rlhf[torchao]'"


def test_without_cuda_transformer_engine_is_not_imported(machine, monkeypatch):
    machine((9, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    assert te.obstacle(recipe("block")) == "there is no CUDA device"
    assert torchao.obstacle(recipe("rowwise")) == ""  # emulated, where it is asked for by name


def test_a_package_that_cannot_be_imported(machine, monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            if name.startswith(("transformer_engine", "torchao")):
                raise RuntimeError(f"{name}: shared object not found.\nand a page more")

    machine((9, 0))
    for module in ("transformer_engine", "transformer_engine.pytorch", "torchao", "torchao.float8"):
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    for backend, package in ((te, "transformer_engine"), (torchao, "torchao")):
        assert backend.obstacle(recipe("current")).endswith(f": {package}: shared object not found.")


def test_an_old_gpu(machine):
    machine((8, 0))
    assert "below 8.9" in torchao.obstacle(recipe("rowwise"))


@pytest.mark.parametrize("name", ["block", "delayed"])
def test_one_product_of_one_layer_is_refused_by_name(name):
    with pytest.raises(ConfigError, match=r"fp8\.keep: wgrad in high precision: with recipe"):
        te.layer(nn.Linear(64, 64), recipe(name), frozenset({"wgrad"}))
    with pytest.raises(ConfigError, match=r"fp8\.keep: dgrad in high precision: backend torchao can leave out wgrad only"):
        torchao.layer(nn.Linear(64, 64), recipe("rowwise"), frozenset({"dgrad"}))
