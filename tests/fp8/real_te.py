"""Run with `python -O` and the pure-Python wheel of Transformer Engine 2.20 on the path: builds our te layers on its real
classes and prints what became of them. Its compiled extension and CUDA are answered by stand-ins, its matrix product by torch.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from without_gpu import without_kernels

without_kernels()
torch.version.cuda = "12.9"

import transformer_engine.pytorch as engine  # noqa: E402
from transformer_engine.common import recipe as recipes  # noqa: E402
from transformer_engine.pytorch import quantization  # noqa: E402

from rlhf.config.sections import Fp8  # noqa: E402
from rlhf.errors import ConfigError  # noqa: E402
from rlhf.fp8.apply import apply, described, undo  # noqa: E402
from rlhf.fp8.backends import open_backend, te  # noqa: E402
from rlhf.fp8.recipes import recipe_of  # noqa: E402
from rlhf.fp8.state import advance, fp8_state  # noqa: E402

Manager = quantization.FP8GlobalStateManager
quantization._MXFP8_SUPPORT = True, ""  # the stand-in is a Hopper
on_cuda = quantization.DelayedScalingRecipeState.__init__
quantization.DelayedScalingRecipeState.__init__ = lambda *args, **rest: on_cuda(*args, **rest | {"device": torch.device("cpu")})


def built(bias: bool = True, **fp8: Any) -> tuple[nn.Linear, Any]:
    linear, recipe = nn.Linear(128, 256, bias=bias, dtype=torch.bfloat16), recipe_of(Fp8(backend="te", **fp8))
    linear.weight.requires_grad_(False)
    assert_no(te.obstacle(recipe))
    return linear, te.layer(linear, recipe, frozenset())


def assert_no(trouble: str) -> None:
    if trouble:  # `assert` is off under -O
        raise AssertionError(trouble)


def parameters(bias: bool) -> dict[str, Any]:
    linear, layer = built(bias, recipe="block")
    return {
        "keys": list(layer.state_dict()),
        "same": layer.weight is linear.weight and layer.bias is linear.bias,
        "frozen": not layer.weight.requires_grad,
        "is te.Linear": isinstance(layer, engine.Linear),
        "loads": str(layer.load_state_dict(linear.state_dict())),
    }


def recipe_fields(fp8: dict[str, Any]) -> dict[str, Any]:
    recipe = recipe_of(Fp8(**fp8))
    kind, given = te.arguments(recipe, recipe.high_precision)
    made = te.engine_recipe(recipe, recipe.high_precision)
    known = {field.name for field in dataclasses.fields(getattr(recipes, kind))}
    return {
        "class": type(made).__name__,
        "unknown": sorted(set(given) - known),
        "not taken": sorted(name for name, value in given.items() if getattr(made, name) != value),
        "format": made.fp8_format.name,
        "backward_override": made.backward_override,
    }


def quantizers(fp8: dict[str, Any]) -> list[Any]:
    """[power of two, dimensions of the block] of activation, weight and gradient."""
    _, layer = built(**fp8)
    with engine.autocast(enabled=True, recipe=layer.engine_recipe):
        layer.init_fp8_metadata()
    three = *layer.quantizers["scaling_fwd"][:2], layer.quantizers["scaling_bwd"][0]
    return [[getattr(one, "force_pow_2_scales", None), getattr(one, "block_scaling_dim", None)] for one in three]


def delayed() -> dict[str, Any]:
    _, layer = built(recipe="delayed", amax_history=4)
    with engine.autocast(enabled=True, recipe=layer.engine_recipe):
        layer.init_fp8_metadata()
        Manager.add_fp8_tensors_to_global_buffer(layer.fp8_meta)
        ours = len(Manager.quantization_state.global_amax_buffer)
        plain = engine.Linear(128, 256, device="cpu")
        plain.init_fp8_metadata()
        Manager.add_fp8_tensors_to_global_buffer(plain.fp8_meta)
        theirs = len(Manager.quantization_state.global_amax_buffer)
        Manager.reset()  # else leaving the region would move the plain layer's scales, by a kernel
    three = *layer.quantizers["scaling_fwd"][:2], layer.quantizers["scaling_bwd"][0]
    for amax, one in zip((8.0, 2.0, 0.5), three, strict=True):  # as its kernels would
        one.amax.fill_(amax)
    advance(layer)
    with torch.no_grad(), engine.autocast(enabled=True, recipe=layer.engine_recipe):
        layer.init_fp8_metadata()
        for one in three[:2]:
            one.amax.fill_(1000.0)
    return {
        "scales": [float(one.scale) for one in three],
        "history": layer.amax_history.tolist(),
        "moved by Transformer Engine": [ours, theirs],
        "state": sorted(fp8_state(layer)),
        "keys": list(layer.state_dict()),
    }


def forward(fp8: dict[str, Any], tokens: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def product(layer: Any, x: torch.Tensor) -> torch.Tensor:
        seen.update(tokens=len(x), inside=Manager.is_fp8_enabled() and Manager.get_fp8_recipe() is layer.engine_recipe)
        return F.linear(x, layer.weight, layer.bias)

    engine.Linear.forward, original = product, engine.Linear.forward
    torch.manual_seed(0)
    linear = nn.Linear(128, 256)
    layer = te.layer(linear, recipe_of(Fp8(**fp8)), frozenset())
    x = torch.randn(1, tokens, 128, requires_grad=True)
    gradient = torch.randn(1, tokens, 256) * 1e-6
    y = layer(x)
    y.backward(gradient)
    scales = layer.scale.tolist() if layer.recipe.delayed else []
    grads = x.grad, linear.weight.grad, linear.bias.grad
    if scales:  # as where a checkpoint without them is loaded
        layer.scale.zero_()
        x.grad = linear.weight.grad = linear.bias.grad = None
        layer(x).backward(gradient)
    anew = layer.scale.tolist() if scales else []
    engine.Linear.forward = original
    flat = gradient.flatten(0, 1)
    expected = F.linear(x, linear.weight, linear.bias), gradient @ linear.weight, flat.t() @ x[0], flat.sum(0)
    results = y, *grads
    off = [float((one - two).abs().max() / two.abs().max()) for one, two in zip(results, expected, strict=True)]
    largest = [float(one.abs().max()) for one in (x, linear.weight, gradient)]
    return seen | {"off": max(off), "after": Manager.is_fp8_enabled(), "scales": scales, "anew": anew, "largest": largest}


def model() -> dict[str, Any]:
    whole = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64))
    before = {name: id(one) for name, one in whole.named_parameters()}
    apply(whole, Fp8(recipe="current", backend="auto"))
    said, during = described(whole), {name: id(one) for name, one in whole.named_parameters()}
    undo(whole)
    after = {name: id(one) for name, one in whole.named_parameters()}
    return {"said": said, "same": before == during == after, "undone": [type(one).__name__ for one in whole]}


def refused(fp8: dict[str, Any], keep: list[str], width: int = 128) -> str:
    try:
        recipe = recipe_of(Fp8(**fp8))
        open_backend("te", recipe).layer(nn.Linear(width, 128), recipe, frozenset(keep))  # pyright: ignore
    except ConfigError as error:
        return str(error)
    return ""


print(json.dumps({key: globals()[call](**rest) for key, (call, rest) in json.loads(sys.argv[1]).items()}))
