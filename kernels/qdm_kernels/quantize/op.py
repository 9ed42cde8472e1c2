"""Quantization of activations to signed int8 codes (README: Arithmetic contract). Operators qdm::quantize and qdm::quantize_per_token."""

from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.prepared import integer_op
from qdm_kernels.quantize import cpu, reference


@cache
def _triton() -> ModuleType:
    return import_module("qdm_kernels.quantize.triton")


@integer_op
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, step: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """Round activations to signed codes of `bits`: float [...] -> int8 [...], memory format kept.

    q = round_half_even(clamp(x * (1 / scale), lo - z, hi - z)) + z in float32, lo = -2^(bits-1), hi = 2^(bits-1) - 1.
    scale: float32, 0-dim, [1] or broadcastable against x; zero_point: integer tensor of the same shape, within [lo, hi].
    step: int32 [1] on the device of x: scale and zero_point are tables, [S] or one entry, and this is their row; None = no tables.
    backend: that of the layer which reads the codes, chosen before; None = `qdm_kernels.backend.choose`.
    Infinities saturate; NaN becomes the code of zero. ValueError on bits outside 2..8, a floating zero_point, or an integer x.
    """
    _check(x, zero_point, bits)
    if not torch.compiler.is_compiling():
        return _quantize(x, scale, zero_point, bits, step, backend)
    # plain tensor code, which inductor fuses with what made x: a pass over memory less
    return reference.quantize(x, reference.pick(scale, step), reference.pick(zero_point, step), bits)


@integer_op
def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row on its own symmetric scale: float [..., K] -> (int8 [..., K], float32 scale [..., 1]).

    scale = max|row| / (2^(bits-1) - 1); 1 for a row of zeros, NaN for a row that holds NaN, so that its products show it. Errors as
    `quantize`, and on rows of no entries.
    """
    _check(x, None, bits)
    if x.shape[-1] == 0:
        raise ValueError(f"a row has at least one entry, got {tuple(x.shape)}")
    return reference.quantize_per_token(x, bits) if torch.compiler.is_compiling() else _quantize_per_token(x, bits)


@torch.library.custom_op("qdm::quantize", mutates_args=())
def _operator(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, step: Tensor | None) -> Tensor:
    return _quantize(x, scale, zero_point, bits, step)


@_operator.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, step: Tensor | None) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8)


@torch.library.custom_op("qdm::quantize_per_token", mutates_args=())
def _operator_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return _quantize_per_token(x, bits)


@_operator_per_token.register_fake
def _(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, step: Tensor | None, name: str | None = None) -> Tensor:
    name = name or _backend.choose("quantize", device=x.device)
    if name == "triton":
        kernels = _triton()
        if kernels.takes(scale, zero_point, step):
            return kernels.quantize(x, scale, zero_point, bits, step)
    plain = cpu if name == "cpu" else reference
    return plain.quantize(x, reference.pick(scale, step), reference.pick(zero_point, step), bits)


def _quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    name = _backend.choose("quantize", device=x.device)
    if name != "reference":
        home = cpu if name == "cpu" else _triton()
        return home.quantize_per_token(x, bits)
    scale = reference.row_scale(x, bits)
    return _quantize(x, scale, torch.zeros((), dtype=torch.int32, device=x.device), bits, None), scale


def _check(x: Tensor, zero_point: Tensor | None, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2..8, got {bits}")
    if not x.is_floating_point():
        raise ValueError(f"x is floating point, got {x.dtype}")
    if zero_point is not None and zero_point.is_floating_point():
        raise ValueError(f"zero_point is an integer tensor, got {zero_point.dtype}")
