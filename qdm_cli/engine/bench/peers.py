"""Rivals of one layer, each in its own words and only where installed: what torch ships, and torchao."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.bench.shapes import LayerShape

Calls = dict[str, Callable[[int], Any]]


def peer_calls(shape: LayerShape, inputs: list[Tensor], weight: Tensor, bias: Tensor) -> Calls:
    """Calls of rivals for this layer; empty where none applies."""
    if shape.op != "linear":
        return {}
    found: Calls = {}
    for add in (_int_mm, _scaled_mm, _torchao):
        for name, call in add(inputs, weight, bias).items():
            try:
                call(0)
            except (RuntimeError, NotImplementedError, TypeError, AssertionError):  # this shape or device is not for it
                continue
            found[name] = call
    return found


def _int_mm(inputs: list[Tensor], weight: Tensor, bias: Tensor) -> Calls:
    """torch._int_mm on ready codes: the product alone. Without VNNI its CPU form saturates, so it is timed and never used."""
    codes = [_codes(x)[0] for x in inputs]
    right = _codes(weight.float())[0].t()
    return {"torch._int_mm, ready codes": lambda i: torch._int_mm(codes[i], right)}


def _scaled_mm(inputs: list[Tensor], weight: Tensor, bias: Tensor) -> Calls:
    """fp8 with one scale per row and column, quantization inside; Hopper and Ada only."""
    if inputs[0].device.type != "cuda":
        return {}
    top = torch.finfo(torch.float8_e4m3fn).max
    w_scale = weight.abs().amax(1, keepdim=True).float() / top
    w8 = (weight / w_scale).to(torch.float8_e4m3fn).t()

    def call(index: int) -> Tensor:
        x = inputs[index]
        x_scale = x.abs().amax(1, keepdim=True).float() / top
        return torch._scaled_mm((x / x_scale).to(torch.float8_e4m3fn), w8, x_scale, w_scale.t(), bias=bias, out_dtype=x.dtype)

    return {"torch._scaled_mm fp8 row-wise": call}


def _torchao(inputs: list[Tensor], weight: Tensor, bias: Tensor) -> Calls:
    """torchao's dynamic int8, eager as qdm's own layer is."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return {}
    linear = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype)
    linear.weight, linear.bias = nn.Parameter(weight.clone(), requires_grad=False), nn.Parameter(bias, requires_grad=False)
    model = nn.Sequential(linear)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return {"torchao int8 dynamic": lambda i: model(inputs[i])}


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).to(torch.int8), scale
