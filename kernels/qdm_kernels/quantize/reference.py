"""Plain quantization, the contract spelled out."""

import torch
from torch import Tensor


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """q = round_half_even(clamp(x * (1 / scale), lo - z, hi - z)) + z; arguments as in `op.quantize`."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    z = zero_point.float()
    scaled = x.float() * scale.float().reciprocal()
    return (torch.round(torch.minimum(torch.maximum(scaled, low - z), high - z)) + z).to(torch.int8)
