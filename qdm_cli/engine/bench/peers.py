"""Rivals of one layer, each in its own words and only where installed: what torch ships, torchao, and the x86 quantizer of both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.bench.shapes import LayerShape

Calls = dict[str, Callable[[int], Any]]


def peer_calls(shape: LayerShape, inputs: list[Tensor], weight: Tensor, bias: Tensor, *, compiled: bool = False) -> Calls:
    """Calls of rivals for this layer; empty where none applies. compiled: also those that are made by torch.compile."""
    adders: list[Callable[[], Calls]] = []
    if shape.op == "linear":
        adders = [
            lambda: _int_mm(inputs, weight),
            lambda: _scaled_mm(inputs, weight, bias),
            lambda: _torchao(inputs, _module(shape, weight, bias)),
        ]
    if compiled:
        adders.append(lambda: _x86_inductor(inputs, _module(shape, weight, bias)))
    found: Calls = {}
    for add in adders:
        for name, call in add().items():
            try:
                call(0)
            except (RuntimeError, NotImplementedError, TypeError, AssertionError):  # this shape or device is not for it
                continue
            found[name] = call
    return found


def _module(shape: LayerShape, weight: Tensor, bias: Tensor) -> nn.Module:
    """The float layer as torch writes it."""
    if shape.op == "linear":
        layer: nn.Module = nn.Linear(shape.inputs, shape.outputs, device="meta")
    else:
        sides = {"stride": shape.stride, "padding": shape.kernel // 2}
        layer = nn.Conv2d(shape.inputs, shape.outputs, shape.kernel, **sides, device="meta")
    layer.weight, layer.bias = (nn.Parameter(t.clone(), requires_grad=False) for t in (weight, bias))
    return layer.eval()


def _int_mm(inputs: list[Tensor], weight: Tensor) -> Calls:
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


def _torchao(inputs: list[Tensor], layer: nn.Module) -> Calls:
    """torchao's dynamic int8, eager as qdm's own layer is."""
    try:
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_
    except ImportError:
        return {}
    model = nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return {"torchao int8 dynamic": lambda i: model(inputs[i])}


def _x86_inductor(inputs: list[Tensor], layer: nn.Module) -> Calls:
    """PyTorch's own static int8 for x86: exported, calibrated on the first input, lowered by inductor, weights packed ahead (freezing).

    The graph takes float32 and computes its remainder in the dtype of the inputs, by autocast, as its documentation does it.
    """
    if inputs[0].device.type != "cpu":
        return {}
    try:
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError:
        return {}
    floats = [x.float() for x in inputs]
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(layer.float(), (floats[0],)).module(), quantizer)
    prepared(floats[0])
    compiled = torch.compile(convert_pt2e(prepared))

    @torch.no_grad()
    def call(index: int) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inputs[0].dtype == torch.bfloat16):
            return compiled(floats[index])

    with torch._inductor.config.patch(freezing=True):
        call(0)
    return {"X86 inductor int8": call}


def _codes(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).to(torch.int8), scale
