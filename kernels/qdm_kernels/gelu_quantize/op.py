"""GELU or GEGLU and quantization: what the second linear layer of an MLP reads (README: Producers).

Operators qdm::gelu_quantize and qdm::gelu_quantize_per_token, used under torch.compile on GPUs.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.gelu_quantize import cpu
from qdm_kernels.prepared import integer_op
from qdm_kernels.producer import as_operator, check_producer, row_of, traced
from qdm_kernels.quantize.op import quantize as _quantize
from qdm_kernels.quantize.op import quantize_per_token as _quantize_per_token


@cache
def _implementation(name: str) -> ModuleType:
    return import_module(f"qdm_kernels.gelu_quantize.{name}")


@integer_op
def gelu_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, gated: bool = False, approximate: str = "none", gain: Tensor | None = None,
    step: Tensor | None = None, bits: int = 8,
) -> Tensor:  # fmt: skip
    """Codes of gelu(x) * gain, or with gated of value * gelu(gate) * gain for x = [value, gate]: float [..., K or 2 K] -> int8 [..., K].

    scale, zero_point: one element, or tables [S] where step, int32 [1], is given. approximate: none (error function) or tanh. gain: [K],
    or [S, K] with a step; None = 1. The float part is not bit-identical across backends: a value within about 1e-6 of a tie may round
    either way. ValueError on shapes that do not fit.
    """
    _check(x, gated, approximate, gain, step, bits, scale, zero_point)
    call = torch.ops.qdm.gelu_quantize if as_operator(x) else _static
    return call(x, gated, approximate, gain, scale, zero_point, step, bits)


@integer_op
def gelu_quantize_per_token(
    x: Tensor, *, gated: bool = False, approximate: str = "none", gain: Tensor | None = None, step: Tensor | None = None, bits: int = 8
) -> tuple[Tensor, Tensor]:
    """As `gelu_quantize` with a symmetric scale per row, max|row| / (2^(bits-1) - 1): -> (int8 [..., K], float32 [..., 1])."""
    _check(x, gated, approximate, gain, step, bits, None, None)
    call = torch.ops.qdm.gelu_quantize_per_token if as_operator(x) else _per_token
    return call(x, gated, approximate, gain, step, bits)


def _static(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, scale: Tensor, zero_point: Tensor, step: Tensor | None, bits: int
) -> Tensor:
    home = cpu if traced(x) else _home(x, gated, per_token=False)
    if hasattr(home, "activate_quantize") and not traced(x):
        return home.activate_quantize(x, gated, approximate, gain, scale, zero_point, step, bits)[0]
    return _quantize(home.activate(x, gated, approximate, row_of(gain, step)), scale, zero_point, bits, step)


def _per_token(x: Tensor, gated: bool, approximate: str, gain: Tensor | None, step: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    home = cpu if traced(x) else _home(x, gated, per_token=True)
    if hasattr(home, "activate_quantize") and not traced(x):
        return home.activate_quantize(x, gated, approximate, gain, None, None, step, bits)
    return _quantize_per_token(home.activate(x, gated, approximate, row_of(gain, step)), bits)


@torch.library.custom_op("qdm::gelu_quantize", mutates_args=())
def _operator(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, scale: Tensor, zero_point: Tensor, step: Tensor | None, bits: int
) -> Tensor:
    return _static(x, gated, approximate, gain, scale, zero_point, step, bits)


@_operator.register_fake
def _(x: Tensor, gated: bool, *rest: Any) -> Tensor:
    return x.new_empty(_outputs(x, gated), dtype=torch.int8)


@torch.library.custom_op("qdm::gelu_quantize_per_token", mutates_args=())
def _operator_per_token(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, step: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    return _per_token(x, gated, approximate, gain, step, bits)


@_operator_per_token.register_fake
def _(x: Tensor, gated: bool, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(_outputs(x, gated), dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _outputs(x: Tensor, gated: bool) -> tuple[int, ...]:
    return (*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


def _home(x: Tensor, gated: bool, *, per_token: bool) -> ModuleType:
    name = backend.choose("gelu_quantize", device=x.device)
    refused = _implementation(name).why_not(_outputs(x, gated)[-1], per_token) if name == "triton" else None
    return _implementation(backend.choose("gelu_quantize", device=x.device, without="triton") if refused else name)


def _check(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, step: Tensor | None, bits: int, scale: Tensor | None,
    zero_point: Tensor | None,
) -> None:  # fmt: skip
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate is none or tanh, got {approximate!r}")
    if gated and x.shape[-1] % 2:
        raise ValueError(f"a gated input has two halves, got {tuple(x.shape)}")
    check_producer(x, _outputs(x, gated)[-1], gain, step, bits, scale, zero_point)
