"""GroupNorm, SiLU and quantization on CPUs: one pass for the moments, one from input to codes; in C++ where that compiles.

Without it, the second pass goes over blocks of pixels that stay inside the cache.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.blocks import block_of, pixels, slices
from qdm_kernels.native import producers
from qdm_kernels.onednn import to_unsigned
from qdm_kernels.producer import row_of
from qdm_kernels.quantize.cpu import quantize_block_


def normalize(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str
) -> Tensor:
    """As `reference.normalize`, in float32, from torch's own operators: what torch.compile fuses with the quantization."""
    affine = [None if t is None else t.float() for t in (weight, bias)]
    y = torch.group_norm(x.float(), groups, *affine, eps)
    y = F.silu(y) if activation == "silu" else y
    y = y if gain is None else y * gain.float().view(1, -1, 1, 1)
    return y.contiguous(memory_format=torch.channels_last)


def normalize_quantize(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str, scale: Tensor,
    zero_point: Tensor, step: Tensor | None, bits: int, shift: Tensor | None = None, *, unsigned: bool = False,
) -> Tensor:  # fmt: skip
    """As `op.group_norm_quantize`. shift: float [B, C], added to every pixel of x first (a time embedding); None = 0.

    unsigned: uint8 codes, shifted by +128.
    """
    x = (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous(memory_format=torch.channels_last)
    grid, gain = producers.grid_of(scale, zero_point, step, bits), row_of(gain, step)
    if producers.takes(x):
        return codes_of(x, groups, weight, bias, gain, eps, activation, grid, torch.uint8 if unsigned else torch.int8, shift)
    factor, offset = _affine(x, groups, weight, bias, eps, shift)
    codes = torch.empty_like(x, dtype=torch.int8)
    source, target, step_rows = pixels(x), pixels(codes), block_of(x.shape[1])
    scratch = torch.empty((min(step_rows, source.shape[1]), x.shape[1]))
    for image in range(x.shape[0]):
        for rows in slices(source.shape[1], step_rows):
            y = scratch[: rows.stop - rows.start]
            torch.addcmul(offset[image], y.copy_(source[image, rows]), factor[image], out=y)
            y = F.silu(y, inplace=True) if activation == "silu" else y
            y = y if gain is None else y.mul_(gain.float())
            quantize_block_(y, grid.inverse, grid.zero_point, bits, target[image, rows])
    return to_unsigned(codes) if unsigned else codes


def codes_of(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str,
    grid: producers.Grid, dtype: torch.dtype, shift: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The native loop on an x it takes, channels_last. dtype: int8, or uint8 for codes shifted by +128."""
    codes = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    affine = producers.group_affine(x, groups, weight, bias, shift, eps)
    producers.affine_codes(x, affine, gain, activation == "silu", codes, grid)
    return codes


def _affine(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    """Normalization as y = x * factor + offset: float32 [B, C] both, from the moments of every channel."""
    b, c = x.shape[:2]
    moments = [torch.batch_norm_update_stats(x[i : i + 1], None, None, 0.0) for i in range(b)]
    mean, variance = (torch.stack([m[i].float() for m in moments]) if b else x.new_zeros((0, c)).float() for i in (0, 1))
    mean = mean if shift is None else mean + shift.float()
    grouped = mean.view(b, groups, c // groups)
    centre = grouped.mean(2, keepdim=True)
    # the mean of the channels' variances and the variance of their means: no difference of large squares
    spread = variance.view(b, groups, c // groups).mean(2, keepdim=True) + (grouped - centre).square().mean(2, keepdim=True)
    factor = (spread + eps).rsqrt().expand(b, groups, c // groups).reshape(b, c)
    factor = factor if weight is None else factor * weight.float()
    offset = (0 if shift is None else shift.float()) - centre.expand_as(grouped).reshape(b, c)
    offset = offset * factor
    return factor, offset if bias is None else offset + bias.float()
