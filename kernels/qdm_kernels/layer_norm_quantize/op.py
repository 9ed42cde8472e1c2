"""LayerNorm, adaLN modulation and quantization: what a linear layer reads (README: Producers).

Operators qdm::layer_norm_quantize and qdm::layer_norm_quantize_per_token, used under torch.compile on GPUs.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.layer_norm_quantize import cpu
from qdm_kernels.prepared import integer_op
from qdm_kernels.producer import as_operator, check_producer, row_of, traced
from qdm_kernels.quantize.op import quantize, quantize_per_token


@cache
def _implementation(name: str) -> ModuleType:
    return import_module(f"qdm_kernels.layer_norm_quantize.{name}")


@integer_op
def layer_norm_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None,
    modulation: tuple[Tensor, Tensor] | None = None, gain: Tensor | None = None, step: Tensor | None = None, eps: float = 1e-5,
    bits: int = 8,
) -> Tensor:  # fmt: skip
    """Codes of (LayerNorm(x) * (1 + m) + shift) * gain: float [B, ..., K] -> int8 of the same shape.

    scale, zero_point: one element, or tables [S] where step, int32 [1], is given. weight, bias: [K], None = 1 and 0. modulation:
    (m, shift), each [B, K]; None = 0 and 0. gain: [K], or [S, K] with a step; None = 1. The float part is not bit-identical across
    backends: a value within about 1e-6 of a tie may round either way. ValueError on shapes that do not fit.
    """
    args = _checked(x, weight, bias, modulation, gain, step, bits, scale, zero_point)
    if as_operator(x):
        return torch.ops.qdm.layer_norm_quantize(x, *args, eps, scale, zero_point, step, bits)
    return _static(x, *args, eps, scale, zero_point, step, bits)


@integer_op
def layer_norm_quantize_per_token(
    x: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None, modulation: tuple[Tensor, Tensor] | None = None,
    gain: Tensor | None = None, step: Tensor | None = None, eps: float = 1e-5, bits: int = 8,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `layer_norm_quantize` with a symmetric scale per row, max|row| / (2^(bits-1) - 1): -> (int8 [..., K], float32 [..., 1])."""
    args = _checked(x, weight, bias, modulation, gain, step, bits)
    if as_operator(x):
        return torch.ops.qdm.layer_norm_quantize_per_token(x, *args, eps, step, bits)
    return _per_token(x, *args, eps, step, bits)


def _static(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float, scale: Tensor,
    zero_point: Tensor, step: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    home = cpu if traced(x) else _home(x)
    if hasattr(home, "normalize_quantize") and not traced(x):
        return home.normalize_quantize(x, weight, bias, modulation, gain, eps, scale, zero_point, step, bits)[0]
    return quantize(home.normalize(x, weight, bias, modulation, row_of(gain, step), eps), scale, zero_point, bits, step)


def _per_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float,
    step: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    home = cpu if traced(x) else _home(x)
    if hasattr(home, "normalize_quantize") and not traced(x):
        return home.normalize_quantize(x, weight, bias, modulation, gain, eps, None, None, step, bits)
    return quantize_per_token(home.normalize(x, weight, bias, modulation, row_of(gain, step), eps), bits)


@torch.library.custom_op("qdm::layer_norm_quantize", mutates_args=())
def _operator(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float, scale: Tensor,
    zero_point: Tensor, step: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    return _static(x, weight, bias, modulation, gain, eps, scale, zero_point, step, bits)


@_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.int8)


@torch.library.custom_op("qdm::layer_norm_quantize_per_token", mutates_args=())
def _operator_per_token(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float,
    step: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _per_token(x, weight, bias, modulation, gain, eps, step, bits)


@_operator_per_token.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _home(x: Tensor) -> ModuleType:
    name = backend.choose("layer_norm_quantize", device=x.device)
    refused = _implementation(name).why_not(x.shape[-1]) if name == "triton" else None
    return _implementation(backend.choose("layer_norm_quantize", device=x.device, without="triton") if refused else name)


def _checked(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: tuple[Tensor, Tensor] | None, gain: Tensor | None,
    step: Tensor | None, bits: int, scale: Tensor | None = None, zero_point: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, list[Tensor], Tensor | None]:  # fmt: skip
    check_producer(x, x.shape[-1], gain, step, bits, scale, zero_point, weight, bias)
    for value in modulation or ():
        if value.shape != (x.shape[0], x.shape[-1]):
            raise ValueError(f"modulation is [B, K], {(x.shape[0], x.shape[-1])}, got {tuple(value.shape)}")
    return weight, bias, list(modulation or ()), gain
