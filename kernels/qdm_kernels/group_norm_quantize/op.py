"""GroupNorm, SiLU and quantization: what a convolution of a U-Net reads (README: Producers).

Operator qdm::group_norm_quantize, used under torch.compile on GPUs.
"""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.group_norm_quantize import cpu
from qdm_kernels.prepared import integer_op
from qdm_kernels.producer import as_operator, check_producer, row_of, traced
from qdm_kernels.quantize.op import quantize


@cache
def _implementation(name: str) -> ModuleType:
    return import_module(f"qdm_kernels.group_norm_quantize.{name}")


@integer_op
def group_norm_quantize(
    x: Tensor, groups: int, scale: Tensor, zero_point: Tensor, *, weight: Tensor | None = None, bias: Tensor | None = None,
    activation: str = "silu", gain: Tensor | None = None, step: Tensor | None = None, eps: float = 1e-5, bits: int = 8,
) -> Tensor:  # fmt: skip
    """Codes of activation(GroupNorm(x)) * gain: float [B, C, H, W] -> int8 channels_last.

    scale, zero_point: one element, or tables [S] where step, int32 [1], is given. weight, bias: [C], None = 1 and 0. activation: silu or
    none. gain: [C], or [S, C] with a step; None = 1. The float part is not bit-identical across backends: a value within about 1e-6 of
    a tie may round either way. ValueError on shapes that do not fit.
    """
    if x.dim() != 4 or groups < 1 or x.shape[1] % groups:
        raise ValueError(f"x is [B, C, H, W] with C a multiple of {groups} groups, got {tuple(x.shape)}")
    if activation not in ("silu", "none"):
        raise ValueError(f"activation is silu or none, got {activation!r}")
    check_producer(x, x.shape[1], gain, step, bits, scale, zero_point, weight, bias)
    call = torch.ops.qdm.group_norm_quantize if as_operator(x) else _run
    return call(x, groups, weight, bias, gain, eps, activation, scale, zero_point, step, bits)


def _run(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str, scale: Tensor,
    zero_point: Tensor, step: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    home = cpu if traced(x) else _implementation(backend.choose("group_norm_quantize", device=x.device))
    if hasattr(home, "normalize_quantize") and not traced(x):
        return home.normalize_quantize(x, groups, weight, bias, gain, eps, activation, scale, zero_point, step, bits)
    return quantize(home.normalize(x, groups, weight, bias, row_of(gain, step), eps, activation), scale, zero_point, bits, step)


@torch.library.custom_op("qdm::group_norm_quantize", mutates_args=())
def _operator(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str, scale: Tensor,
    zero_point: Tensor, step: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    return _run(x, groups, weight, bias, gain, eps, activation, scale, zero_point, step, bits)


@_operator.register_fake
def _(x: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8, memory_format=torch.channels_last)
