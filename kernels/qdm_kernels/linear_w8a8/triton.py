"""Linear layer on CUDA GPUs: x [M, K] times w [N, K] on integer tensor cores, 8-bit weights or 4-bit ones in two K-planes.

Both operands are read along K. Few rows (M <= 32) change places with the weights, so that a tile still has the 64 rows of a warp group.
"""

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.epilogue.triton import activate, pick, store
from qdm_kernels.exact import subtract_zero_point, value_range
from qdm_kernels.gemm.tiles import GROUP_M, Plan, aligned, cdiv, choose_plan
from qdm_kernels.gemm.triton import (
    COMPILED,
    Call,
    Product,
    Weights,
    follow,
    kinds,
    multiply,
    overlaps,
    plane_offsets,
    scalar_on,
    sums_of,
    tile_of,
    unpack_high,
    unpack_low,
    without_centre,
)  # fmt: skip
from qdm_kernels.layout import pack_int4, padded_length

# A row of a table stands at any address: it is read one element at a time, so that no variant need know more.
SCALARS = ["x_scale_ptr", "x_zero_ptr", "step_ptr", "out_scale_ptr", "out_zero_ptr"]
_MOST_INPUTS = 131_071  # 128 * 128 * K must stay below 2^31: integer tensor cores saturate there


@triton.jit
def centred(acc, offs_m, offs_n, m_ok, n_ok, sums_ptr, centre_ptr, x_sums_ptr, x_zero):
    """sum (x - z_x)(w - z_w) of raw sums of x w: z_x by the sums of w - z_w, z_w by those of the rows of x."""
    acc -= x_zero * tl.load(sums_ptr + offs_n, mask=n_ok, other=0)[None, :]
    return without_centre(acc, offs_m, offs_n, m_ok, n_ok, centre_ptr, x_sums_ptr)


@triton.jit
def scaled_tile(
    acc, offs_m, offs_n, m_ok, n_ok, x_scale_ptr, step_ptr, w_scale_ptr, bias_ptr, PER_ROW: tl.constexpr, TABLES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Corrected sums [BM, BN] -> float32: scales and bias."""
    w_scale = tl.load(w_scale_ptr + offs_n, mask=n_ok, other=0.0)
    if PER_ROW:
        y = acc.to(tl.float32) * (tl.load(x_scale_ptr + offs_m, mask=m_ok, other=0.0)[:, None] * w_scale[None, :])
    else:
        y = acc.to(tl.float32) * (pick(x_scale_ptr, step_ptr, TABLES & 1) * w_scale)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=n_ok, other=0.0)[None, :]
    return y


@triton.jit
def finish_tile(
    acc, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE: tl.constexpr, PER_ROW: tl.constexpr, TABLES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """Raw int32 sums [BM, BN] -> corrected for x's zero point, scaled, finished and stored. An int32 output takes the corrected sums."""
    m_ok, n_ok = offs_m < M, offs_n < N
    mask = m_ok[:, None] & n_ok[None, :]
    at = (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * N + offs_n[None, :]
    x_zero = pick(x_zero_ptr, step_ptr, TABLES & 2).to(tl.int32)
    acc = centred(acc, offs_m, offs_n, m_ok, n_ok, sums_ptr, centre_ptr, x_sums_ptr, x_zero)
    if out_ptr.dtype.element_ty == tl.int32:
        tl.store(out_ptr + at, acc, mask=mask)
    else:
        y = scaled_tile(acc, offs_m, offs_n, m_ok, n_ok, x_scale_ptr, step_ptr, w_scale_ptr, bias_ptr, PER_ROW, TABLES, HAS_BIAS)
        store(
            y, out_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, step_ptr, at, mask, ACTIVATION, HAS_RESIDUAL, TABLES & 4, TABLES & 8
        )  # fmt: skip


@triton.jit
def finish_gated(
    value, gate, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE: tl.constexpr, PER_ROW: tl.constexpr, TABLES: tl.constexpr, HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):  # fmt: skip
    """As `finish_tile`, for raw sums of columns offs_n and offs_n + N / 2: value * gelu(gate), [M, N / 2]."""
    half = N // 2
    m_ok, n_ok = offs_m < M, offs_n < half
    x_zero = pick(x_zero_ptr, step_ptr, TABLES & 2).to(tl.int32)
    gate = centred(gate, offs_m, half + offs_n, m_ok, n_ok, sums_ptr, centre_ptr, x_sums_ptr, x_zero)
    y = scaled_tile(gate, offs_m, half + offs_n, m_ok, n_ok, x_scale_ptr, step_ptr, w_scale_ptr, bias_ptr, PER_ROW, TABLES, HAS_BIAS)
    y = activate(y, "gelu")
    value = centred(value, offs_m, offs_n, m_ok, n_ok, sums_ptr, centre_ptr, x_sums_ptr, x_zero)
    y *= scaled_tile(value, offs_m, offs_n, m_ok, n_ok, x_scale_ptr, step_ptr, w_scale_ptr, bias_ptr, PER_ROW, TABLES, HAS_BIAS)
    at, mask = (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * half + offs_n[None, :], m_ok[:, None] & n_ok[None, :]
    store(y, out_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, step_ptr, at, mask, "none", HAS_RESIDUAL, TABLES & 4, TABLES & 8)


@triton.jit
def halves(acc, BM: tl.constexpr, BN: tl.constexpr):
    """Left and right columns of a tile, without an exchange between threads."""
    return tl.split(tl.permute(tl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))


@triton.jit
def part_of(acc, BM: tl.constexpr, BN: tl.constexpr, PARTS: tl.constexpr, part: tl.constexpr):
    """One of 1, 2 or 4 equal parts of the columns of a tile."""
    some = acc
    if PARTS > 1:
        left, right = halves(some, BM, BN)
        some = left if part < PARTS // 2 else right
    if PARTS > 2:
        left, right = halves(some, BM, BN // 2)
        some = left if part % 2 == 0 else right
    return some


# TABLES: which of x_scale 1, x_zero_point 2, out_scale 4, out_zero_point 8 are indexed by the step.
@triton.jit(do_not_specialize=["M", "BLOCKS", "BLOCKS_PER_SPLIT"], do_not_specialize_on_alignment=SCALARS)
def linear_kernel(
    x_ptr, w_ptr, work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, K, BLOCKS, BLOCKS_PER_SPLIT,
    WIDE: tl.constexpr, PER_ROW: tl.constexpr, TABLES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr, EVEN_K: tl.constexpr, SWAP: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """One [BM, BN] tile of the output or, with SPLIT, of the raw sums of one share of K.

    x [M, K] int8; w [N, BLOCKS * BK] int8, or half as many bytes in two K-planes; work [splits, M, N] int32; out [M, N]. A finished
    `geglu` tile has BN / 2 values and their gates.
    """
    GATED: tl.constexpr = ACTIVATION == "geglu" and not SPLIT
    if OVERLAP:
        follow()
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP_M)
    offs_m, offs_n = tile_m * BM + tl.arange(0, BM), tile_n * BN + tl.arange(0, BN)
    m_ok, n_ok = offs_m < M, offs_n < N
    if GATED:
        j = tl.arange(0, BN)
        offs_n = tile_n * (BN // 2) + j % (BN // 2)
        n_ok = offs_n < N // 2
        offs_n += tl.where(j < BN // 2, 0, N // 2)
    width: tl.constexpr = BK if BITS == 8 else BK // 2
    offs_k = plane_offsets(width, BITS)
    x_tile = x_ptr + (offs_m.to(tl.int64) if WIDE else offs_m)[:, None] * K + offs_k[None, :]
    w_tile = w_ptr + (offs_n.to(tl.int64) if WIDE else offs_n)[:, None] * (BLOCKS * width) + tl.arange(0, width)[None, :]

    begin = tl.program_id(1) * BLOCKS_PER_SPLIT
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), dtype=tl.int32)
    for block in range(begin, tl.minimum(begin + BLOCKS_PER_SPLIT, BLOCKS)):
        k = block * BK
        w = tl.load(w_tile + block * width, mask=n_ok[:, None], other=0)
        x = tl.load(x_tile + k, mask=m_ok[:, None] if EVEN_K else m_ok[:, None] & (k + offs_k < K)[None, :], other=0)
        if BITS == 8:
            acc = multiply(x, w, acc, SWAP)
        else:
            high = tl.load(x_tile + k + 32, mask=m_ok[:, None] if EVEN_K else m_ok[:, None] & (k + offs_k + 32 < K)[None, :], other=0)
            acc = multiply(x, unpack_low(w, ASM), acc, SWAP)
            acc = multiply(high, unpack_high(w, ASM), acc, SWAP)
    if BITS == 4:
        acc = acc >> 4  # every product carries the factor 16 of a nibble kept in the high half
    if SWAP:
        acc = acc.T

    if SPLIT:
        at = (tl.program_id(1).to(tl.int64) * M + offs_m)[:, None] * N + offs_n[None, :]
        tl.store(work_ptr + at, acc, mask=m_ok[:, None] & n_ok[None, :])
    elif GATED:
        # Part by part of a wide tile: registers again.
        PARTS: tl.constexpr = 1 if BM * BN < 8192 else 2 if BM * BN < 16384 else 4
        WIDTH: tl.constexpr = BN // 2 // PARTS
        value, gate = halves(acc, BM, BN)
        for part in tl.static_range(PARTS):
            finish_gated(
                part_of(value, BM, BN // 2, PARTS, part), part_of(gate, BM, BN // 2, PARTS, part), offs_m,
                tile_n * (BN // 2) + part * WIDTH + tl.arange(0, WIDTH), sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr,
                step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES,
                HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip
    elif BM * BN >= 8192 and centre_ptr is not None:
        for part in tl.static_range(4):
            finish_tile(
                part_of(acc, BM, BN, 4, part), offs_m, tile_n * BN + part * (BN // 4) + tl.arange(0, BN // 4), sums_ptr, centre_ptr,
                x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr,
                M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip
    elif BM * BN >= 8192:
        # Two halves, one after the other: a whole tile's epilogue takes half as many registers again.
        left, right = halves(acc, BM, BN)
        offs_half = tile_n * BN + tl.arange(0, BN // 2)
        finish_tile(
            left, offs_m, offs_half, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr,
            residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
        finish_tile(
            right, offs_m, offs_half + BN // 2, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr,
            bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip
    else:
        finish_tile(
            acc, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
            out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "SPLITS"], do_not_specialize_on_alignment=SCALARS)
def finish_kernel(
    work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr,
    out_zero_ptr, out_ptr, M, N, SPLITS,
    WIDE: tl.constexpr, PER_ROW: tl.constexpr, TABLES: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Adds the shares of K, in order, and finishes them: work [SPLITS, M, N] int32 -> out [M, N], or with `geglu` [M, N / 2]."""
    if OVERLAP:
        follow()
    offs_m, offs_n = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN)
    columns = N // 2 if ACTIVATION == "geglu" else N
    m_ok = offs_m < M
    mask = m_ok[:, None] & (offs_n < columns)[None, :]
    row = offs_m.to(tl.int64) * N
    acc, gate = tl.zeros((BM, BN), dtype=tl.int32), tl.zeros((BM, BN), dtype=tl.int32)
    share, half = tl.cast(M, tl.int64) * N, N // 2
    for split in range(SPLITS):
        acc += tl.load(work_ptr + split * share + row[:, None] + offs_n[None, :], mask=mask, other=0)
        if ACTIVATION == "geglu":
            gate += tl.load(work_ptr + split * share + row[:, None] + half + offs_n[None, :], mask=mask, other=0)
    if ACTIVATION == "geglu":
        finish_gated(
            acc, gate, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr,
            residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL,
        )  # fmt: skip
    else:
        finish_tile(
            acc, offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
            out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@dataclass(frozen=True)
class State(Weights):
    """Weights as the kernel reads them.

    weight: [N, ceil64(K)] int8, or half as many bytes uint8 in two K-planes; sums: int32 [N], of the weights minus their zero points.
    centre: None = zero points are 0 or folded into the weight; else z_w, int32 [N].
    """

    weight: Tensor
    sums: Tensor
    centre: Tensor | None
    inputs: int
    strategy: str = "triton"
    reason: str | None = None

    @cached_property
    def padded(self) -> int:
        """Inputs of a row as it is stored."""
        return self.weight.shape[1] * 8 // self.bits


def why_not(inputs: int) -> str | None:
    """Why this kernel does not take a layer of so many inputs; None = it does."""
    return f"{inputs} inputs can saturate int32 tensor cores, {_MOST_INPUTS} cannot" if inputs > _MOST_INPUTS else None


def prepare(codes: Tensor, zero_point: Tensor, bits: int = 8) -> State:
    """Lay out the weight; arguments as in `op.prepare`. bits 4: codes within [-8, 7], kept two to a byte."""
    weight, centre = subtract_zero_point(codes, zero_point), None
    sums, (low, high), limit = weight.sum(1, dtype=torch.int32), value_range(weight), 1 << bits - 1
    if low < -limit or high >= limit:
        weight, centre = codes, zero_point.to(torch.int32)
    stored = F.pad(weight.to(torch.int8), (0, padded_length(codes.shape[1]) - codes.shape[1]))
    return State(pack_int4(stored) if bits == 4 else stored, sums, centre, codes.shape[1])


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum_k (x - z_x)(w - z_w): x int8 [..., K] -> int32 [..., N]."""
    return launch(x, zero_point, state, torch.int32)


def linear(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State, end: Epilogue) -> Tensor:
    """The whole layer: x int8 [..., K] -> [..., N] of end.out_dtype.

    x_scale, zero_point: one element, or tables where end.step is set; without a step x_scale may be [..., 1]. end.residual: [..., N].
    """
    return launch(x, zero_point, state, end.out_dtype, x_scale=x_scale, w_scale=w_scale, bias=bias, end=end)


def launch(
    x: Tensor, zero_point: Tensor, state: State, dtype: torch.dtype, *, x_scale: Tensor | None = None, w_scale: Tensor | None = None,
    bias: Tensor | None = None, end: Epilogue = Epilogue(), plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    """Run the kernels; dtype int32 = corrected sums. plan: None = chosen by `gemm.tiles`."""
    *lead, k = x.shape
    out = torch.empty((*lead, end.width(state.outputs)), dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    m = x.numel() // k
    if k % 16:
        x = F.pad(x, (0, state.padded - k))
    x = aligned(x)
    pointers, kind = finishing(out, zero_point, x_scale, w_scale, bias, end, sums_of(x, state))
    key = (m, k, plan, end.activation, kind)
    ready = state.ready.get(key)
    if ready is None:
        ready = state.ready.keep(key, _ready(x.view(m, -1), state, out.shape[-1], pointers, kind, end.activation, plan))
    ready(x, state.weight, pointers)
    return out


def _ready(
    x: Tensor, state: State, columns: int, pointers: tuple[Tensor | None, ...], kind: tuple[Any, ...], activation: str, plan: Plan | None
) -> Product:
    """What `launch` launches for x [M, K] and an output of so many columns."""
    (m, _), device, weight, n = x.shape, x.device, state.weight, state.outputs
    plan = plan or choose_plan(f"linear_w{state.bits}a8", m, n, state.padded, device)
    wide = max(x.numel(), m * n, weight.numel()) >= 1 << 31
    flags, split, finish = (wide, *options_of(pointers, activation)), plan.splits > 1, None
    make = import_module("qdm_kernels.hopper.triton").linear_call if plan.tile.tma else _multiply
    if split:
        constants = (*flags, 32, 64, overlaps(device))
        finish = Call(
            finish_kernel, (cdiv(m, 32), cdiv(columns, 64), 1),
            ("linear finish", device.index, constants, kind, n % 16 == 0, n == 1), (m, n, plan.splits, *constants),
            {"num_warps": 4, "launch_pdl": overlaps(device)},
        )  # fmt: skip
    return Product(make(x, weight, split, flags, kind, plan), finish, (plan.splits, m, n))


def _multiply(x: Tensor, weight: Tensor, split: bool, flags: tuple[Any, ...], kind: tuple[Any, ...], plan: Plan) -> Call:
    """Launch of `linear_kernel`."""
    tile, splits, (m, k), (f, width) = plan.tile, plan.splits, x.shape, weight.shape
    bits = 4 if weight.dtype == torch.uint8 else 8
    blocks, overlap = width * 8 // bits // tile.bk, overlaps(x.device)
    constants = (*flags, bits, COMPILED, k % tile.bk == 0, tile.swap, split, tile.bm, tile.bn, tile.bk, GROUP_M, overlap)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers, "launch_pdl": overlap}
    return Call(
        linear_kernel, (cdiv(m, tile.bm) * cdiv(f, tile.bn), splits, 1),
        ("linear", x.device.index, constants, kind, tile, f % 16 == 0, f == 1, k % 16 == 0),
        (m, f, k, blocks, -(-blocks // splits), *constants), options,
    )  # fmt: skip


def finishing(
    out: Tensor, zero_point: Tensor, x_scale: Tensor | None, w_scale: Tensor | None, bias: Tensor | None, end: Epilogue,
    sums: tuple[Tensor, Tensor | None, Tensor | None],
) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:  # fmt: skip
    """What every epilogue takes: its pointers in the kernels' order, and what launches of these depend on. sums: of `sums_of`."""
    device = out.device
    step, x_scale, zero = scalar_on(end.step, device), scalar_on(x_scale, device), scalar_on(zero_point, device)
    out_scale, out_zero = scalar_on(end.out_scale, device), scalar_on(end.out_zero_point, device)
    residual = None if end.residual is None else aligned(end.residual)
    w_scale, bias = None if w_scale is None else aligned(w_scale), None if bias is None else aligned(bias)
    pointers = (*sums, x_scale, zero, step, w_scale, bias, residual, out_scale, out_zero, out)
    many = [t is not None and t.numel() > 1 for t in (x_scale, zero, out_scale, out_zero)]
    return pointers, (*kinds(*pointers), *many)


def options_of(pointers: tuple[Tensor | None, ...], activation: str) -> tuple[Any, ...]:
    """PER_ROW, TABLES, HAS_BIAS, HAS_RESIDUAL and ACTIVATION of an epilogue."""
    _, _, _, x_scale, zero, step, _, bias, residual, out_scale, out_zero, _ = pointers
    many = [t is not None and t.numel() > 1 for t in (x_scale, zero, out_scale, out_zero)]
    tables = 0 if step is None else sum(1 << i for i, one in enumerate(many) if one)
    return step is None and many[0], tables, bias is not None, residual is not None, activation
