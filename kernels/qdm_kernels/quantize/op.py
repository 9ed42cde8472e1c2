"""Quantization of activations to signed int8 codes (README: Arithmetic contract)."""

import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.prepared import integer_op
from qdm_kernels.quantize import cpu, reference

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}
_SMALLEST_ROW = 1e-30  # below it the reciprocal of the scale overflows; such a row is treated as zero


@integer_op
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Round activations to signed codes of `bits`: float [...] -> int8 [...], memory format kept.

    q = round_half_even(clamp(x * (1 / scale), lo - z, hi - z)) + z in float32, lo = -2^(bits-1), hi = 2^(bits-1) - 1.
    scale: float32, 0-dim, [1] or broadcastable against x; zero_point: integer tensor of the same shape, within [lo, hi].
    Infinities saturate; NaN has no code. ValueError on bits outside 2..8, a floating zero_point, or an integer x.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2..8, got {bits}")
    if not x.is_floating_point():
        raise ValueError(f"x is floating point, got {x.dtype}")
    if zero_point.is_floating_point():
        raise ValueError(f"zero_point is an integer tensor, got {zero_point.dtype}")
    return _IMPLEMENTATIONS[backend.choose("quantize", device=x.device)].quantize(x, scale, zero_point, bits)


@integer_op
def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Round each row on its own symmetric scale: float [..., K] -> (int8 [..., K], float32 scale [..., 1]).

    scale = max|row| / (2^(bits-1) - 1); 1 for a row of zeros. Errors as `quantize`.
    """
    top = x.abs().amax(-1, keepdim=True).float()
    scale = torch.where(top > _SMALLEST_ROW, top / ((1 << bits - 1) - 1), 1.0)
    return quantize(x, scale, torch.zeros((), dtype=torch.int32, device=x.device), bits), scale
