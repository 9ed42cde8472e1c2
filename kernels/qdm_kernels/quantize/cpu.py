"""Quantization on CPUs: in C++ where that compiles, else block by block in one scratch of the second-level cache."""

from functools import cache

import torch
from torch import Tensor

from qdm_kernels.blocks import block_of, in_memory_order, slices
from qdm_kernels.native import producers
from qdm_kernels.native import quantize as native
from qdm_kernels.native.producers import Grid
from qdm_kernels.onednn import to_unsigned
from qdm_kernels.quantize.reference import row_scale

# 1.5 * 2^23: adding it to |v| < 2^22 rounds v half to even and leaves the integer in the low bits of the float.
_ROUNDER = 12582912.0


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """As `op.quantize`; the zero point is read once when it is a single number. NaN becomes the code of zero."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    inverse = scale.float().reciprocal()
    if zero_point.numel() > 1:
        z = zero_point.float()
        rounded = (x.float() * inverse).clamp_(low - z, high - z).add_(_ROUNDER)
        return _low_bytes(rounded).add_(zero_point.to(torch.int8))
    number, flat = int(zero_point), in_memory_order(x)
    if inverse.numel() > 1 or flat is None or x.dtype == torch.float64:
        return _finish(_low_bytes((x.float() * inverse).clamp_(low - number, high - number).add_(_ROUNDER)), number)
    codes = torch.empty_like(x, dtype=torch.int8)
    target = in_memory_order(codes)
    assert target is not None
    if native.takes(x):
        native.quantize_into(flat, target, float(inverse), number, bits)
        return codes
    block = block_of(1)
    scratch = torch.empty(min(block, flat.numel()))
    for part in slices(flat.numel(), block):
        values = scratch[: part.stop - part.start]
        if x.dtype == torch.float32:
            torch.mul(flat[part], inverse.reshape(()), out=values)
        else:
            values.copy_(flat[part]).mul_(inverse.reshape(()))
        target[part] = values.clamp_(low - number, high - number).add_(_ROUNDER).view(torch.int32)
    return _finish(codes, number)


def quantize_for(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, grid: Grid | None, dtype: torch.dtype) -> Tensor:
    """Codes of `quantize` as int8, or as uint8 shifted by +128. grid: scale and zero point as numbers; None = not known."""
    unsigned = dtype == torch.uint8
    if grid is None or scale.dim() or not native.takes(x) or (flat := in_memory_order(x)) is None:
        codes = quantize(x, scale, zero_point, bits)
        return to_unsigned(codes) if unsigned else codes
    codes = torch.empty_like(x, dtype=dtype)
    native.quantize_into(flat, codes, grid.inverse, grid.zero_point, bits, unsigned=unsigned)
    return codes


def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `op.quantize_per_token`."""
    if producers.takes(x):
        codes, scale = torch.empty(x.shape, dtype=torch.int8), torch.empty((*x.shape[:-1], 1))
        producers.per_token(x.contiguous(), bits, codes, scale)
        return codes, scale
    scale = row_scale(x, bits)
    return quantize(x, scale, torch.zeros((), dtype=torch.int32), bits), scale


def quantize_block_(values: Tensor, inverse: float, zero_point: int, bits: int, out: Tensor) -> None:
    """Codes of float32 values into int8 `out`, contiguous both; values are overwritten. inverse: 1 / scale.

    The product is added to the rounder in one operation, perhaps without a rounding between them: a value within one float32 rounding
    of a tie may go the other way than by the contract. For producers, whose own values differ by as much.
    """
    low, high = -(1 << bits - 1) - zero_point, (1 << bits - 1) - 1 - zero_point
    torch.add(_rounder(), values, alpha=inverse, out=values)
    out.copy_(values.clamp_(_ROUNDER + low, _ROUNDER + high).view(torch.int32))
    if zero_point:
        out.add_(zero_point)


@cache
def _rounder() -> Tensor:
    return torch.tensor(_ROUNDER)


def _finish(codes: Tensor, zero_point: int) -> Tensor:
    return codes.add_(zero_point) if zero_point else codes


def _low_bytes(rounded: Tensor) -> Tensor:
    """int8 of the integer in each float's low bits: the copy wraps, and so may the zero point's addition: their sum is in range."""
    return rounded.view(torch.int32).to(torch.int8)
