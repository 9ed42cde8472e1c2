"""`producers.cpp` on tensors: normalization, activation and quantization in one pass. Codes go into int8, or uint8 shifted by +128."""

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qdm_kernels.native.build import library
from qdm_kernels.quantize.reference import pick

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}
_POINTER, _SIZE, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_GRID = [_FLOAT, *[_INT] * 4]  # Grid and the number of threads
_ARGUMENTS = {
    "group_moments": [_POINTER, *[_SIZE] * 4, *[_POINTER] * 3, _FLOAT, *[_POINTER] * 2, _INT],
    "affine_codes": [_POINTER, *[_SIZE] * 3, *[_POINTER] * 3, _INT, _POINTER, *_GRID],
    "layer_norm": [_POINTER, *[_SIZE] * 2, *[_POINTER] * 2, _SIZE, _FLOAT, *[_POINTER] * 2, *_GRID],
    "gelu": [_POINTER, *[_SIZE] * 4, _INT, *[_POINTER] * 3, *_GRID],
    "per_token": [_POINTER, *[_SIZE] * 2, *[_POINTER] * 2, *[_INT] * 3],
}


@dataclass(frozen=True)
class Grid:
    """Where values go: the reciprocal of the scale, the signed zero point, bits. A row's own scale replaces the first."""

    inverse: float
    zero_point: int
    bits: int = 8

    def arguments(self, codes: Tensor) -> tuple[float, int, int, int, int]:
        return self.inverse, self.zero_point, self.bits, _flip(codes), torch.get_num_threads()


def grid_of(scale: Tensor | None, zero_point: Tensor | None, step: Tensor | None, bits: int) -> Grid:
    """The numbers of a call; without a scale rows have scales of their own."""
    if scale is None or zero_point is None:
        return Grid(1.0, 0, bits)
    return Grid(float(pick(scale, step).float().reciprocal()), int(pick(zero_point, step)), bits)


def takes(x: Tensor) -> bool:
    """Do the native loops read values like those of x?"""
    return x.dtype in _KINDS and x.device.type == "cpu" and library("producers") is not None


def group_affine(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """GroupNorm(x + shift) as x * factor + offset, float32 [B, C] both: x [B, C, H, W] channels_last; shift [B, C]; weight, bias [C]."""
    b, c, h, w = x.shape
    held = [_floats(t) for t in (weight, bias, shift)]
    factor, offset = torch.empty((b, c)), torch.empty((b, c))
    call, out = _function("group_moments", x.dtype), (factor.data_ptr(), offset.data_ptr())
    call(x.data_ptr(), b, h * w, c, groups, *map(_at, held), eps, *out, torch.get_num_threads())
    return factor, offset


def affine_codes(x: Tensor, affine: tuple[Tensor, Tensor], gain: Tensor | None, with_silu: bool, codes: Tensor, grid: Grid) -> None:
    """Codes of silu(x * factor + offset) * gain: x, codes [B, C, H, W] channels_last; gain [C] or None."""
    b, c, h, w = x.shape
    gain = _floats(gain)
    call, where = _function("affine_codes", x.dtype), (x.data_ptr(), b, h * w, c)
    call(*where, *map(_at, affine), _at(gain), with_silu, codes.data_ptr(), *grid.arguments(codes))


def layer_norm(
    x: Tensor,
    factor: Tensor | None,
    offset: Tensor | None,
    rows_per_factor: int,
    eps: float,
    codes: Tensor,
    scales: Tensor | None,
    grid: Grid,
) -> None:
    """Codes of LayerNorm(x) * factor + offset: x, codes [..., K] contiguous.

    factor, offset: [K], or [B, K] for `rows_per_factor` rows each; 0 = the same for all. scales: float32 [rows], filled with the scale of
    each row; None = all by the grid.
    """
    held = [_floats(t) for t in (factor, offset)]
    width = x.shape[-1]
    call, where = _function("layer_norm", x.dtype), (x.data_ptr(), x.numel() // width, width)
    call(*where, *map(_at, held), rows_per_factor, eps, codes.data_ptr(), _at(scales), *grid.arguments(codes))


def gelu(x: Tensor, gated: bool, tanh: bool, gain: Tensor | None, codes: Tensor, scales: Tensor | None, grid: Grid) -> None:
    """Codes of gelu(x), or of value * gelu(gate) for x = [value, gate], times gain [K]: x contiguous, codes [..., K]. scales: as above."""
    gain, width = _floats(gain), codes.shape[-1]
    call, rows = _function("gelu", x.dtype), codes.numel() // width
    where = (x.data_ptr(), rows, width, x.shape[-1], width if gated else 0, tanh)
    call(*where, _at(gain), codes.data_ptr(), _at(scales), *grid.arguments(codes))


def per_token(x: Tensor, bits: int, codes: Tensor, scales: Tensor) -> None:
    """Symmetric codes and scales of every row: x, codes [..., K] contiguous, scales float32 [rows]."""
    call, width = _function("per_token", x.dtype), x.shape[-1]
    where = (x.data_ptr(), x.numel() // width, width, codes.data_ptr(), scales.data_ptr())
    call(*where, bits, _flip(codes), torch.get_num_threads())


def _flip(codes: Tensor) -> int:
    return 0x80 if codes.dtype == torch.uint8 else 0


def _floats(t: Tensor | None) -> Tensor | None:
    return None if t is None else t.float().contiguous()


def _at(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


@cache
def _function(name: str, dtype: torch.dtype):
    made = library("producers")
    assert made is not None
    function = getattr(made, f"qdm_{name}_{_KINDS[dtype]}")
    function.argtypes, function.restype = _ARGUMENTS[name], None
    return function
