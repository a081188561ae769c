"""Run with torchao on the path: our reference layer beside torchao's, emulated on a CPU; prints how far apart they are."""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import nn

from rlhf.config.sections import Fp8
from rlhf.fp8.apply import apply, described, undo
from rlhf.fp8.backends import open_backend, reference, torchao
from rlhf.fp8.recipes import recipe_of


def products(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> list[torch.Tensor]:
    x = x.detach().clone().requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(gradient)
    return [y.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]  # pyright: ignore


def apart(fp8: dict[str, Any], kind: str, control: dict[str, Any], as_on_gpu: bool = False) -> dict[str, Any]:
    """Relative differences of y, dx, dW and db; `control`: settings of the reference alone; `as_on_gpu`: not emulated."""
    recipe = dataclasses.replace(recipe_of(Fp8(**fp8)), kind=kind)
    torch.manual_seed(0)
    linear = nn.Linear(272, 144)
    x, gradient = torch.randn(2, 45, 272), torch.randn(2, 45, 144) * 1e-3  # 90 tokens: no multiple of 16
    with mock.patch("torch.cuda.is_available", return_value=as_on_gpu):
        theirs = torchao.layer(linear, recipe, frozenset())
    ours = reference.layer(linear, dataclasses.replace(recipe_of(Fp8(**fp8 | control)), kind=kind), frozenset())
    with mock.patch("torch._scaled_mm", wraps=torch._scaled_mm) as product:
        pairs = list(zip(products(ours, x, gradient), products(theirs, x, gradient), strict=True))
    summed_over = [call.args[0].shape[1] for call in product.call_args_list]
    return {"off": [float((one - two).norm() / two.norm()) for one, two in pairs], "summed over": summed_over}


def autocast(high_precision: list[str]) -> dict[str, str]:
    linear = nn.Linear(64, 32)
    layer = torchao.layer(linear, recipe_of(Fp8(recipe="rowwise", high_precision=tuple(high_precision))), frozenset())
    x = torch.randn(16, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    return {"y": str(y.dtype), "dx": str(x.grad.dtype), "dW": str(linear.weight.grad.dtype)}  # pyright: ignore


def model() -> dict[str, Any]:
    whole = nn.Sequential(nn.Linear(64, 32, bias=False), nn.Linear(32, 64))
    whole[0].weight.requires_grad_(False)
    keys, before = list(whole.state_dict()), {name: id(one) for name, one in whole.named_parameters()}
    apply(whole, Fp8(recipe="rowwise", backend="torchao"))
    said, during = described(whole), {name: id(one) for name, one in whole.named_parameters()}
    same_keys = keys == list(whole.state_dict())
    undo(whole)
    after = {name: id(one) for name, one in whole.named_parameters()}
    auto = open_backend("auto", recipe_of(Fp8(recipe="rowwise"))).name
    return {"said": said, "same": before == during == after, "same keys": same_keys, "auto": auto}


print(json.dumps({key: globals()[call](**rest) for key, (call, rest) in json.loads(sys.argv[1]).items()}))
