"""Plain quantization, the contract spelled out."""

import torch
from torch import Tensor

SMALLEST_ROW = 1e-30  # below it the reciprocal of the scale overflows; such a row is treated as zero


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """q = round_half_even(clamp(x * (1 / scale), lo - z, hi - z)) + z, z where that is NaN; arguments as in `op.quantize`."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    z = zero_point.float()
    scaled = torch.nan_to_num(x.float() * scale.float().reciprocal(), nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    return (torch.round(torch.minimum(torch.maximum(scaled, low - z), high - z)) + z).to(torch.int8)


def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scale of every row; arguments as in `op.quantize_per_token`."""
    scale = row_scale(x, bits)
    return quantize(x, scale, torch.zeros((), dtype=torch.int32, device=x.device), bits), scale


def row_scale(x: Tensor, bits: int) -> Tensor:
    """max|row| / (2^(bits-1) - 1), 1 for a row of zeros, NaN for one with NaN: [..., K] -> float32 [..., 1]."""
    top = x.abs().amax(-1, keepdim=True).float()
    return torch.where(top <= SMALLEST_ROW, 1.0, top / ((1 << bits - 1) - 1))


def pick(table: Tensor, step: Tensor | None) -> Tensor:
    """Row of a per-step table, [S] -> 0-dim; a table of one entry has no other row. None = not a table: as it is."""
    if step is None:
        return table
    flat = table.reshape(-1)
    return (flat if flat.numel() == 1 else flat.index_select(0, step.reshape(1))).reshape(())
