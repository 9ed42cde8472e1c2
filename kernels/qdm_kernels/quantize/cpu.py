"""Quantization in one allocation: every pass after the first works in place."""

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """As `op.quantize`; the zero point is read once when it is a single number."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    inverse = scale.float().reciprocal()
    scaled = x.float().mul(inverse) if x.dtype == torch.float32 else x.float().mul_(inverse)
    if zero_point.numel() > 1:
        z = zero_point.float()
        return scaled.clamp_(low - z, high - z).round_().add_(z).to(torch.int8)
    number = int(zero_point)
    codes = scaled.clamp_(low - number, high - number).round_()
    return (codes.add_(number) if number else codes).to(torch.int8)
