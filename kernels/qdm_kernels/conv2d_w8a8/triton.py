"""Convolution on CUDA GPUs: implicit GEMM over NHWC codes on integer tensor cores, 8-bit or packed 4-bit weights.

M = B * H' * W' output pixels, N = filters, K = taps x input channels. The loop walks (tap, channel block). A tap outside the image loads
0; the epilogue corrects for the zero point with the weight sum of the taps that were valid, a table over intervals of rows and columns.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.conv2d_w8a8.tiles import GROUP_M, choose_conv_plan, register_cap
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.epilogue.triton import pick, store
from qdm_kernels.exact import subtract_zero_point, value_range
from qdm_kernels.gemm.tiles import Plan, aligned, cdiv
from qdm_kernels.gemm.triton import (
    COMPILED,
    Call,
    Product,
    Weights,
    follow,
    multiply,
    overlaps,
    plane_offsets,
    sums_of,
    tile_of,
    unpack_high,
    unpack_low,
    variant,
    without_centre,
)  # fmt: skip
from qdm_kernels.geometry import Conv2dGeometry, Pair
from qdm_kernels.layout import pack_int4, padded_length
from qdm_kernels.linear_w8a8.triton import SCALARS, finishing, halves, options_of, part_of


@triton.jit
def _valid_taps(out, size, TAPS: tl.constexpr, STRIDE: tl.constexpr, PAD: tl.constexpr, DILATION: tl.constexpr):
    """Index of the interval of taps that hit the image for output coordinates along one axis; the last index is the empty interval."""
    start = out * STRIDE - PAD
    first = (tl.maximum(-start, 0) + DILATION - 1) // DILATION
    last = tl.minimum((tl.maximum(size - start, 0) + DILATION - 1) // DILATION, TAPS)
    index = first * TAPS - first * (first - 1) // 2 + (last - first - 1)
    return tl.where(first < last, index, TAPS * (TAPS + 1) // 2)


@triton.jit
def _border_row(
    offs_m, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """Row of the table of weight sums that belongs to each output pixel: [BM]."""
    columns: tl.constexpr = KW * (KW + 1) // 2 + 1
    pixel = offs_m % (OH * OW)
    return _valid_taps(pixel // OW, H, KH, SH, PH, DH) * columns + _valid_taps(pixel % OW, W, KW, SW, PW, DW)


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW"])
def window_sums_kernel(
    x_sums_ptr, out_ptr, M, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sums of the codes that an output pixel reads from those of every pixel of the input: int32 [B, H, W] -> [B, OH, OW]."""
    if OVERLAP:
        follow()
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    image, pixel = at // (OH * OW), at % (OH * OW)
    top, left = (pixel // OW) * SH - PH, (pixel % OW) * SW - PW
    total = tl.zeros((BLOCK,), dtype=tl.int32)
    for tap in tl.static_range(KH * KW):
        y, x = top + tap // KW * DH, left + tap % KW * DW
        inside = (at < M) & (y >= 0) & (y < H) & (x >= 0) & (x < W)
        total += tl.load(x_sums_ptr + (image * H + y) * W + x, mask=inside, other=0)
    tl.store(out_ptr + at, total, mask=at < M)


@triton.jit
def finish_pixels(
    acc, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr, PER_IMAGE: tl.constexpr, TABLES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Raw int32 sums [BM, BN] -> corrected for the zero point, scaled, finished and stored. An int32 output takes the corrected sums."""
    m_ok, n_ok = offs_m < M, offs_n < N
    mask = m_ok[:, None] & n_ok[None, :]
    at = (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * N + offs_n[None, :]
    x_zero = pick(x_zero_ptr, step_ptr, TABLES & 2).to(tl.int32)
    if x_zero != 0:
        row = _border_row(offs_m, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW)
        acc -= x_zero * tl.load(sums_ptr + row[:, None] * N + offs_n[None, :], mask=mask, other=0)
    acc = without_centre(acc, offs_m, offs_n, m_ok, n_ok, centre_ptr, x_sums_ptr)
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + at, acc, mask=mask)
    else:
        w_scale = tl.load(w_scale_ptr + offs_n, mask=n_ok, other=0.0)
        if PER_IMAGE:
            y = acc.to(tl.float32) * (tl.load(x_scale_ptr + offs_m // (OH * OW), mask=m_ok, other=0.0)[:, None] * w_scale[None, :])
        else:
            y = acc.to(tl.float32) * (pick(x_scale_ptr, step_ptr, TABLES & 1) * w_scale)[None, :]
        if HAS_BIAS:
            y += tl.load(bias_ptr + offs_n, mask=n_ok, other=0.0)[None, :]
        store(
            y, out_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, step_ptr, at, mask, ACTIVATION, HAS_RESIDUAL, TABLES & 4, TABLES & 8
        )  # fmt: skip


# TABLES: which of x_scale 1, x_zero_point 2, out_scale 4, out_zero_point 8 are indexed by the step.
@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "BLOCKS", "BLOCKS_PER_SPLIT"], do_not_specialize_on_alignment=SCALARS)
def conv2d_kernel(
    x_ptr, w_ptr, work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, C, H, W, OH, OW, BLOCKS, BLOCKS_PER_SPLIT,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr, PER_IMAGE: tl.constexpr, TABLES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BITS: tl.constexpr, ASM: tl.constexpr, EVEN_C: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of the output, or, with SPLIT, of the raw sums of one share of K.

    x [B, H, W, C] int8; w [N, KH, KW, BLOCKS * BK] int8, or half as many bytes in two K-planes; work [splits, M, N] int32; out [M, N].
    """
    if OVERLAP:
        follow()
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP_M)
    offs_m = tile_m * BM + tl.arange(0, BM)
    offs_n = tile_n * BN + tl.arange(0, BN)
    m_ok, n_ok = offs_m < M, offs_n < N
    image, pixel = offs_m // (OH * OW), offs_m % (OH * OW)
    ih0, iw0 = (pixel // OW) * SH - PH, (pixel % OW) * SW - PW
    if WIDE:
        image = image.to(tl.int64)
    x_row = ((image * H + ih0) * W + iw0) * C

    # Four bits: 32 low nibbles, then the 32 high ones of the same bytes, per 64 channels (README: Packing layout).
    width: tl.constexpr = BK if BITS == 8 else BK // 2
    offs_c = plane_offsets(width, BITS)
    # [BN, BK] transposed after the load: read as [BK, BN] it costs 300 byte permutes and 60 registers on sm_80
    w_tile = w_ptr + (offs_n.to(tl.int64) if WIDE else offs_n)[:, None] * (KH * KW * BLOCKS * width) + tl.arange(0, width)[None, :]

    begin = tl.program_id(1) * BLOCKS_PER_SPLIT
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.int32)
    for block in range(begin, tl.minimum(begin + BLOCKS_PER_SPLIT, KH * KW * BLOCKS)):
        tap, c = block // BLOCKS, (block % BLOCKS) * BK
        r, s = (tap // KW) * DH, (tap % KW) * DW
        inside = (m_ok & (ih0 + r >= 0) & (ih0 + r < H) & (iw0 + s >= 0) & (iw0 + s < W))[:, None]
        x_tile = x_ptr + (x_row + (r * W + s) * C + c)[:, None] + offs_c[None, :]
        weight = tl.load(w_tile + block * width, mask=n_ok[:, None], other=0)
        if BITS == 8:
            a = tl.load(x_tile, mask=inside if EVEN_C else inside & (c + offs_c < C)[None, :], other=0)
            acc = multiply(a, weight, acc, SWAP)
        else:
            low = tl.load(x_tile, mask=inside if EVEN_C else inside & (c + offs_c < C)[None, :], other=0)
            high = tl.load(x_tile + 32, mask=inside if EVEN_C else inside & (c + offs_c + 32 < C)[None, :], other=0)
            acc = multiply(low, unpack_low(weight, ASM), acc, SWAP)
            acc = multiply(high, unpack_high(weight, ASM), acc, SWAP)
    if BITS == 4:
        acc = acc >> 4  # every product carries the factor 16 of a nibble kept in the high half
    if SWAP:
        acc = acc.T

    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
        tl.store(work_ptr + at, acc, mask=m_ok[:, None] & n_ok[None, :])
    else:
        # Two halves, one after the other: 128 registers where a whole tile's epilogue takes 176; with zero points of weights eighths.
        left, right = halves(acc, BM, BN)
        offs_half = tile_n * BN + tl.arange(0, BN // 2)
        if centre_ptr is None or BN < 128:
            finish_pixels(
                left, offs_m, offs_half, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr,
                w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH,
                DW, WIDE, PER_IMAGE, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
            finish_pixels(
                right, offs_m, offs_half + BN // 2, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr,
                w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH,
                DW, WIDE, PER_IMAGE, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
        else:
            for part in tl.static_range(8):
                eighth = part_of(left if part < 4 else right, BM, BN // 2, 4, part % 4)
                finish_pixels(
                    eighth, offs_m, tile_n * BN + part * (BN // 8) + tl.arange(0, BN // 8), sums_ptr, centre_ptr, x_sums_ptr,
                    x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, H,
                    W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, WIDE, PER_IMAGE, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
                )  # fmt: skip


@triton.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "SPLITS"], do_not_specialize_on_alignment=SCALARS)
def finish_kernel(
    work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, SPLITS,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, WIDE: tl.constexpr, PER_IMAGE: tl.constexpr, TABLES: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds the shares of K, in order, and finishes them: work [SPLITS, M, N] int32 -> out [M, N]."""
    if OVERLAP:
        follow()
    offs_m = tl.program_id(0) * BM + tl.arange(0, BM)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    m_ok = offs_m < M
    mask = m_ok[:, None] & (offs_n < N)[None, :]
    row = offs_m.to(tl.int64) * N
    acc = tl.zeros((BM, BN), dtype=tl.int32)
    share = tl.cast(M, tl.int64) * N
    for split in range(SPLITS):
        acc += tl.load(work_ptr + split * share + row[:, None] + offs_n[None, :], mask=mask, other=0)
    finish_pixels(
        acc, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
        out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, KH, KW, SH, SW, PH, PW, DH, DW, WIDE, PER_IMAGE,
        TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
    )  # fmt: skip


@dataclass(frozen=True)
class State(Weights):
    """Weights as the kernel reads them.

    weight: [N, kh, kw, ceil64(I)] int8, or half as many bytes uint8 of two K-planes. sums: int32 [row intervals * column intervals, N],
    of the weights minus their zero points over the taps of an interval. centre: None = zero points are 0 or folded in; else z_w, int32 [N].
    """

    weight: Tensor
    sums: Tensor
    centre: Tensor | None
    channels: int
    geometry: Conv2dGeometry
    strategy: str = "triton"
    reason: str | None = None

    @cached_property
    def kernel(self) -> Pair:
        """Its sides."""
        return self.weight.shape[1], self.weight.shape[2]


def why_not(channels: int, geometry: Conv2dGeometry) -> str | None:
    """Why this kernel does not take a layer; None = it does. channels: of the input."""
    if geometry.groups > 1:
        return f"{geometry.groups} groups: the Triton convolution has no grouped form"
    if channels % 16:
        return f"{channels} input channels are no multiple of 16, which aligned 16-byte reads need"
    return None


def prepare(codes: Tensor, zero_point: Tensor, geometry: Conv2dGeometry, bits: int = 8) -> State:
    """Lay out the weight; arguments as in `op.prepare`. bits 4: codes within [-8, 7], kept two to a byte."""
    weight, centre = subtract_zero_point(codes, zero_point), None
    sums, (low, high), limit = _interval_sums(weight), value_range(weight), 1 << bits - 1
    if low < -limit or high >= limit:
        weight, centre = codes, zero_point.to(torch.int32)
    stored = F.pad(weight.permute(0, 2, 3, 1), (0, padded_length(codes.shape[1]) - codes.shape[1])).to(torch.int8).contiguous()
    return State(pack_int4(stored) if bits == 4 else stored, sums, centre, codes.shape[1], geometry)


def _interval_sums(weight: Tensor) -> Tensor:
    """Sums over the taps of every interval of rows and columns, in the order of `_valid_taps`: int16 [F, I, kh, kw] -> int32 [R * C, F]."""
    taps = weight.sum(1, dtype=torch.int32)
    for dim in (1, 2):
        ends = [*combinations(range(taps.shape[dim] + 1), 2), (0, 0)]
        taps = torch.stack([taps.narrow(dim, first, last - first).sum(dim, dtype=torch.int32) for first, last in ends], dim)
    return taps.flatten(1).T.contiguous()


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum (x - z_x)(w - z_w): x int8 [B, I, H, W] -> int32 [B, O, H', W'], channels_last."""
    return launch(x, zero_point, state, torch.int32)


def conv2d(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State, end: Epilogue) -> Tensor:
    """The whole layer: x int8 [B, I, H, W] channels_last -> [B, O, H', W'] of end.out_dtype, channels_last.

    x_scale, zero_point: one element, or tables where end.step is set; x_scale also [B, 1, 1, 1].
    """
    return launch(x, zero_point, state, end.out_dtype, x_scale=x_scale, w_scale=w_scale, bias=bias, end=end)


def launch(
    x: Tensor, zero_point: Tensor, state: State, dtype: torch.dtype, *, x_scale: Tensor | None = None, w_scale: Tensor | None = None,
    bias: Tensor | None = None, end: Epilogue = Epilogue(), plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernels; dtype int32 = corrected sums. plan: None = chosen by `tiles`."""
    b, _, h, w = x.shape
    size = state.geometry.output_size((h, w), state.kernel)
    out = torch.empty((b, *size, state.outputs), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out.permute(0, 3, 1, 2)
    x = aligned(x.permute(0, 2, 3, 1))
    if end.residual is not None:
        end = replace(end, residual=end.residual.permute(0, 2, 3, 1))
    pointers, kind = finishing(out, zero_point, x_scale, w_scale, bias, end, _sums_of(x, state, size))
    key = (b, h, w, plan, end.activation, kind)
    ready = state.ready.get(key)
    if ready is None:
        ready = state.ready.keep(key, _ready(x, state, size, pointers, kind, end.activation, plan))
    ready(x, state.weight, pointers)
    return out.permute(0, 3, 1, 2)


def _sums_of(x: Tensor, state: State, size: Pair) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `linear_w8a8.triton.sums_of`, over the window of every output pixel of x [B, H, W, C]."""
    weights, centre, sums = sums_of(x, state)
    g, (b, h, w, _) = state.geometry, x.shape
    if sums is None or (state.kernel == (1, 1) and (h, w) == size and g.padding == (0, 0)):
        return weights, centre, sums
    windows, key = torch.empty((b, *size), dtype=torch.int32, device=x.device), (b, h, w)
    call = state.sums_ready.get(key)
    if call is None:
        overlap = overlaps(x.device)
        constants = (*state.kernel, *g.stride, *g.padding, *g.dilation, 256, overlap)
        call = Call(
            window_sums_kernel, (cdiv(windows.numel(), 256), 1, 1), ("window sums", x.device.index, variant(sums, windows), constants),
            (windows.numel(), h, w, *size, *constants), {"num_warps": 4, "launch_pdl": overlap},
        )  # fmt: skip
        state.sums_ready.keep(key, call)
    call(sums, windows)
    return weights, centre, windows


def _ready(
    x: Tensor, state: State, size: Pair, pointers: tuple[Tensor | None, ...], kind: tuple[Any, ...], activation: str, plan: Plan | None
) -> Product:
    """What `launch` launches for x [B, H, W, C]; size: OH, OW."""
    device, g, (b, h, w, _), (n, kh, kw, row) = x.device, state.geometry, x.shape, state.weight.shape
    m, bits = b * size[0] * size[1], state.bits
    plan = plan or choose_conv_plan(f"conv2d_w{bits}a8", m, n, kh * kw, row * 8 // bits, device, dense=g.stride == (1, 1))
    wide = max(x.numel(), m * n, state.weight.numel()) >= 1 << 31
    flags, split, finish = (wide, *options_of(pointers, activation)), plan.splits > 1, None
    make = import_module("qdm_kernels.hopper.triton").conv2d_call if plan.tile.tma else _multiply
    if split:
        constants = (kh, kw, *g.stride, *g.padding, *g.dilation, *flags, 32, 64, overlaps(device))
        finish = Call(
            finish_kernel, (cdiv(m, 32), cdiv(n, 64), 1),
            ("conv2d finish", device.index, constants, kind, n % 16 == 0, n == 1),
            (m, n, h, w, *size, plan.splits, *constants), {"num_warps": 4, "launch_pdl": overlaps(device)},
        )  # fmt: skip
    return Product(make(x, state.weight, split, flags, kind, plan, g, size), finish, (plan.splits, m, n))


def _multiply(
    x: Tensor, weight: Tensor, split: bool, flags: tuple[Any, ...], kind: tuple[Any, ...], plan: Plan, geometry: Conv2dGeometry, size: Pair
) -> Call:
    """Launch of `conv2d_kernel`: x [B, H, W, C]; size: of the output."""
    tile, splits, g, (b, h, w, c), (f, kh, kw, row) = plan.tile, plan.splits, geometry, x.shape, weight.shape
    bits, m = 4 if weight.dtype == torch.uint8 else 8, b * size[0] * size[1]
    blocks, overlap = row * 8 // bits // tile.bk, overlaps(x.device)
    constants = (
        kh, kw, *g.stride, *g.padding, *g.dilation, *flags, bits, COMPILED, c % tile.bk == 0, tile.swap, split, tile.bm, tile.bn, tile.bk,
        GROUP_M, overlap,
    )  # fmt: skip
    cap = register_cap(tile, kh * kw, wide=flags[0])
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": cap, "launch_pdl": overlap}
    return Call(
        conv2d_kernel, (cdiv(m, tile.bm) * cdiv(f, tile.bn), splits, 1),
        ("conv2d", x.device.index, constants, kind, tile, cap, f % 16 == 0, f == 1),
        (m, f, c, h, w, *size, blocks, -(-kh * kw * blocks // splits), *constants), options,
    )  # fmt: skip
