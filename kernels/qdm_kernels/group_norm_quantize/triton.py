"""GroupNorm to codes on CUDA GPUs: one kernel for the moments of every group, one that reads the image again and writes bytes.

The image is cut into segments whose moments the second kernel merges in a fixed order: enough programs, and the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.triton import activate, gain_of, pick, to_codes
from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, overlaps, tensors_of, variant
from qdm_kernels.producer import plain_floats, tables_of

_PIXELS, _CHANNELS = 32, 128  # tile of the second kernel
_MOST_SEGMENTS = 16
_SEGMENT = 128  # least pixels of a segment
_ready: Ready[tuple[Call, Call]] = Ready(4096)
_COUNTS = ["PIXELS", "GROUPS", "SEGMENT", "SEGMENTS"]  # a count of 1 would be no tensor, whose casts are none either


@triton.jit(do_not_specialize=_COUNTS)
def moments_kernel(
    x_ptr, mean_ptr, m2_ptr, PIXELS, C, GROUPS, SEGMENT, SEGMENTS,
    WIDTH: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Mean and sum of squared deviations of one group over one segment: x [B, PIXELS, C] -> [B, SEGMENTS, GROUPS]. WIDTH: C / GROUPS."""
    if OVERLAP:
        follow()
    image, group, segment = tl.program_id(0) // GROUPS, tl.program_id(0) % GROUPS, tl.program_id(1)
    c = tl.arange(0, BC)
    first = segment * SEGMENT
    last = tl.minimum(first + SEGMENT, PIXELS)
    base = x_ptr + (image.to(tl.int64) * PIXELS) * C + group * WIDTH
    mean, m2, count = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(first, last, BP):
        p = start + tl.arange(0, BP)
        mask = (p < last)[:, None] & (c < WIDTH)[None, :]
        x = tl.load(base + p[:, None].to(tl.int64) * C + c[None, :], mask=mask, other=0.0).to(tl.float32)
        n = (tl.minimum(BP, last - start) * WIDTH).to(tl.float32)
        tile_mean = tl.sum(x) / n
        deviation = tl.where(mask, x - tile_mean, 0.0)
        # Chan's merge of two sets of moments: no sum of squares, which cancels where the mean is large
        delta = tile_mean - mean
        mean += delta * (n / (count + n))
        m2 += tl.sum(deviation * deviation) + delta * delta * (count * n / (count + n))
        count += n
    at = (image * SEGMENTS + segment) * GROUPS + group
    tl.store(mean_ptr + at, mean)
    tl.store(m2_ptr + at, m2)


@triton.jit(do_not_specialize=_COUNTS)
def apply_kernel(
    x_ptr, mean_ptr, m2_ptr, weight_ptr, bias_ptr, gain_ptr, scale_ptr, zero_ptr, step_ptr, out_ptr, PIXELS, C, GROUPS, SEGMENT,
    SEGMENTS, EPS,
    WIDTH: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_GAIN: tl.constexpr, GAIN_TABLE: tl.constexpr,
    TABLES: tl.constexpr, ACTIVATION: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BS: tl.constexpr, BG: tl.constexpr,
    BP: tl.constexpr, BC: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Codes of one tile of pixels and channels: x [B, PIXELS, C] -> int8 of the same shape."""
    if OVERLAP:
        follow()
    image = tl.program_id(2)
    s, g = tl.arange(0, BS), tl.arange(0, BG)
    known = (s < SEGMENTS)[:, None] & (g < GROUPS)[None, :]
    at = (image * SEGMENTS + s[:, None]) * GROUPS + g[None, :]
    n = (tl.minimum(SEGMENT, tl.maximum(PIXELS - s * SEGMENT, 0)) * WIDTH).to(tl.float32)[:, None]
    means = tl.load(mean_ptr + at, mask=known, other=0.0)
    total = (PIXELS * WIDTH).to(tl.float32)
    mean = tl.sum(tl.where(known, means * n, 0.0), axis=0) / total
    deviation = tl.where(known, means - mean[None, :], 0.0)
    m2 = tl.sum(tl.load(m2_ptr + at, mask=known, other=0.0) + deviation * deviation * n, axis=0)
    inverse_std = tl.rsqrt(m2 / total + EPS)

    p, c = tl.program_id(0) * BP + tl.arange(0, BP), tl.program_id(1) * BC + tl.arange(0, BC)
    c_ok = c < C
    group = tl.where(c_ok, c // WIDTH, 0)
    mask = (p < PIXELS)[:, None] & c_ok[None, :]
    at = (image.to(tl.int64) * PIXELS + p[:, None]) * C + c[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    y = (x - tl.gather(mean, group, 0)[None, :]) * tl.gather(inverse_std, group, 0)[None, :]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
    y = activate(y, ACTIVATION)
    if HAS_GAIN:
        y *= gain_of(gain_ptr, step_ptr, c, c_ok, C, GAIN_TABLE)[None, :]
    inverse = tl.div_rn(1.0, pick(scale_ptr, step_ptr, TABLES & 1))
    tl.store(out_ptr + at, to_codes(y, inverse, pick(zero_ptr, step_ptr, TABLES & 2), LOW, HIGH), mask=mask)


def normalize_quantize(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str,
    scale: Tensor, zero_point: Tensor, step: Tensor | None, bits: int,
) -> Tensor:  # fmt: skip
    """Codes int8 [B, C, H, W], channels_last."""
    b, c, h, w = x.shape
    x, weight, bias, gain, scale = plain_floats(x.permute(0, 2, 3, 1), weight, bias, gain, scale)
    out = torch.empty((b, h, w, c), dtype=torch.int8, device=x.device)
    if out.numel() == 0:
        return out.permute(0, 3, 1, 2)
    segments = max(1, min(_MOST_SEGMENTS, h * w // _SEGMENT))
    mean, m2 = torch.empty((2, b, segments, groups), dtype=torch.float32, device=x.device)
    tensors = (x, mean, m2, weight, bias, gain, scale, zero_point, step, out)
    gain_table, tables = gain is not None and gain.dim() == 2, tables_of(scale, zero_point, step)
    key = (x.get_device(), x.shape, groups, tensors_of(tensors), gain_table, tables, activation, eps, bits)
    calls = _ready.get(key)
    if calls is None:
        calls = _ready.keep(key, _calls(tensors, groups, gain_table, tables, activation, eps, bits))
    calls[0](x, mean, m2)
    calls[1](*tensors)
    return out.permute(0, 3, 1, 2)


def _calls(
    tensors: tuple[Tensor | None, ...], groups: int, gain_table: bool, tables: int, activation: str, eps: float, bits: int
) -> tuple[Call, Call]:
    """The moments of an image, and what reads them."""
    x, mean, m2, weight, bias, gain, *_ = tensors
    assert x is not None
    assert mean is not None
    (b, h, w, c), segments, overlap = x.shape, mean.shape[1], overlaps(x.device)
    pixels, width = h * w, c // groups
    columns = triton.next_power_of_2(width)
    sizes = (pixels, c, groups, cdiv(pixels, segments), segments)
    tile = (width, max(1, min(128, 4096 // columns)), columns, overlap)
    constants = (
        width, weight is not None, bias is not None, gain is not None, gain_table, tables, activation, -(1 << bits - 1),
        (1 << bits - 1) - 1, triton.next_power_of_2(segments), triton.next_power_of_2(groups), _PIXELS, _CHANNELS, overlap,
    )  # fmt: skip
    options = {"num_warps": 4, "launch_pdl": overlap}
    moments = Call(
        moments_kernel, (b * groups, segments, 1), ("moments", x.device.index, variant(x, mean, m2, c), tile), (*sizes, *tile), options
    )
    apply = Call(
        apply_kernel, (cdiv(pixels, _PIXELS), cdiv(c, _CHANNELS), b), ("apply", x.device.index, variant(*tensors, c), constants),
        (*sizes, eps, *constants), options,
    )  # fmt: skip
    return moments, apply
