"""LayerNorm, modulation and quantization on CPUs: row by row in C++ where that compiles, else by torch's operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.native import producers
from qdm_kernels.producer import row_of
from qdm_kernels.quantize.cpu import quantize, quantize_per_token
from qdm_kernels.quantize.reference import pick


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float) -> Tensor:
    """As `reference.normalize`, in float32, from torch's own operators: under torch.compile one loop with the quantization."""
    gamma, beta = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], gamma, beta, eps)
    if modulation:
        m, shift = (t.float().view(t.shape[0], *[1] * (x.dim() - 2), t.shape[1]) for t in modulation)
        y = y * (1 + m) + shift
    return y if gain is None else y * gain.float()


def normalize_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float, scale: Tensor | None,
    zero_point: Tensor | None, step: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `op.layer_norm_quantize`, without a scale as `op.layer_norm_quantize_per_token`: (codes, scales of rows or None)."""
    gain = row_of(gain, step)
    grid = producers.grid_of(scale, zero_point, step, bits)
    if producers.takes(x):
        scales = torch.empty((*x.shape[:-1], 1)) if scale is None else None
        return codes_of(x, weight, bias, modulation, gain, eps, grid, torch.int8, scales), scales
    y = normalize(x, weight, bias, modulation, gain, eps)
    if scale is None or zero_point is None:
        return quantize_per_token(y, bits)
    return quantize(y, pick(scale, step), pick(zero_point, step), bits), None


def codes_of(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float, grid: producers.Grid,
    dtype: torch.dtype, scales: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The native loop on an x it takes. dtype: int8, or uint8 for codes shifted by +128. scales: filled with those of the rows."""
    factor, offset, rows = _affine(x, weight, bias, modulation, gain)
    codes = torch.empty(x.shape, dtype=dtype)
    producers.layer_norm(x.contiguous(), factor, offset, rows, eps, codes, scales, grid)
    return codes


def _affine(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None
) -> tuple[Tensor | None, Tensor | None, int]:
    """What a normalized row is multiplied with and what is added then: [K], or [B, K] for so many rows each; 0 = [K]."""
    factor, offset, rows = weight, bias, 0
    if modulation:
        m, shift = (t.float() for t in modulation)
        factor = 1 + m if factor is None else factor.float() * (1 + m)
        offset = shift if offset is None else offset.float() * (1 + m) + shift
        rows = x[0].numel() // x.shape[-1] if len(x) else 0
    if gain is None:
        return factor, offset, rows
    return (
        gain.float() if factor is None else factor.float() * gain.float(),
        None if offset is None else offset.float() * gain.float(),
        rows,
    )
