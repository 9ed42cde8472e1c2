"""Quantization in one allocation: every pass after the first works in place, and the last one writes bytes."""

import torch
from torch import Tensor

# 1.5 * 2^23: adding it to |v| < 2^22 rounds v half to even and leaves the integer in the low bits of the float.
_ROUNDER = 12582912.0


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """As `op.quantize`; the zero point is read once when it is a single number. NaN becomes the code of zero."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    inverse = scale.float().reciprocal()
    scaled = x.float().mul(inverse) if x.dtype == torch.float32 else x.float().mul_(inverse)
    if zero_point.numel() > 1:
        z = zero_point.float()
        rounded = scaled.clamp_(low - z, high - z).add_(_ROUNDER)
        return _low_bytes(rounded).add_(zero_point.to(torch.int8))
    number = int(zero_point)
    codes = _low_bytes(scaled.clamp_(low - number, high - number).add_(_ROUNDER))
    return codes.add_(number) if number else codes


def _low_bytes(rounded: Tensor) -> Tensor:
    """int8 of the integer in each float's low bits: the copy wraps, and so may the zero point's addition: their sum is in range."""
    return rounded.view(torch.int32).to(torch.int8)
