"""GELU, GEGLU and quantization on CPUs: row by row in C++ where that compiles, else by torch's operators."""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.native import producers
from qdm_kernels.producer import row_of
from qdm_kernels.quantize.cpu import quantize, quantize_per_token
from qdm_kernels.quantize.reference import pick


def activate(x: Tensor, gated: bool, approximate: str, gain: Tensor | None) -> Tensor:
    """As `reference.activate`, in float32, from torch's own operators: under torch.compile one loop with the quantization."""
    value, gate = x.float().chunk(2, -1) if gated else (None, x.float())
    y = F.gelu(gate, approximate=approximate)
    y = y if value is None else value * y
    return y if gain is None else y * gain.float()


def activate_quantize(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, step: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `op.gelu_quantize`, without a scale as `op.gelu_quantize_per_token`: (codes, scales of rows or None)."""
    gain = row_of(gain, step)
    grid = producers.grid_of(scale, zero_point, step, bits)
    if producers.takes(x):
        scales = torch.empty((*x.shape[:-1], 1)) if scale is None else None
        return codes_of(x, gated, approximate, gain, grid, torch.int8, scales), scales
    y = activate(x, gated, approximate, gain)
    if scale is None or zero_point is None:
        return quantize_per_token(y, bits)
    return quantize(y, pick(scale, step), pick(zero_point, step), bits), None


def codes_of(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, grid: producers.Grid, dtype: torch.dtype, scales: Tensor | None = None
) -> Tensor:
    """The native loop on an x it takes. dtype: int8, or uint8 for codes shifted by +128. scales: filled with those of the rows."""
    codes = torch.empty((*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1]), dtype=dtype)
    producers.gelu(x.contiguous(), gated, approximate == "tanh", gain, codes, scales, grid)
    return codes
