"""Linear layers and convolutions on sm_90 in Gluon: one warp copies tiles by TMA, the others multiply them.

Triton's own pipeliner waits for every integer product before it issues the next loads (`pendings = 0` in its IR, 3.6; products of floats
escape it). Here one product is always in flight, and no multiplying thread computes an address. The epilogue is that of the general
kernels, so the bits are the same. A convolution reads boxes of pixels of its NHWC input; outside the image the copy engine writes zeros.
"""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_init, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from qdm_kernels.conv2d_w8a8.triton import finish_pixels
from qdm_kernels.epilogue.reference import GATED
from qdm_kernels.gemm.tiles import GROUP_M, Plan, Tile, cdiv
from qdm_kernels.gemm.triton import Call, follow, overlaps, tile_of, unpack_high, unpack_low
from qdm_kernels.geometry import Conv2dGeometry, Pair
from qdm_kernels.linear_w8a8.triton import SCALARS, finish_gated, finish_tile, halves

copy_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # renamed after 3.6
Box = tuple[int, int, int]  # images, rows and columns of the pixels of one tile


@gluon.jit
def _buffers(
    x_desc, w_desc, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, ROWS: gl.constexpr
):
    """Tiles of every stage and their barriers: full, counted in bytes by the copy engine, and empty. ROWS: layout of x as a matrix."""
    x = gl.allocate_shared_memory(gl.int8, [STAGES, BM, BK], ROWS)
    w = gl.allocate_shared_memory(w_desc.dtype, [STAGES, BN, WIDTH], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), count=1)
        mbarrier.init(empty.index(s), count=1)
    return x, w, full, empty


@gluon.jit
def _multiply(x, w, full, empty, count, BM: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr):
    """The multiplying warps, 8-bit weights: int32 sums [BM, BN]. A tile is given back once the product after it is under way."""
    acc = warpgroup_mma_init(gl.zeros((BM, BN), gl.int32, LAYOUT))
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        acc = warpgroup_mma(x.index(slot), w.index(slot).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(1, deps=[acc]))
        mbarrier.arrive(empty.index((i + STAGES - 1) % STAGES), pred=i > 0)
    return (warpgroup_mma_wait(0, deps=[acc]),)


@gluon.jit
def _multiply_packed(
    x, w, full, empty, count, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, LAYOUT: gl.constexpr
):
    """The multiplying warps, packed 4-bit weights: sums [BN, BM]. Nibbles become operands in registers, 32 inputs at a time."""
    REGISTERS: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 4)
    acc = warpgroup_mma_init(gl.zeros((BN, BM), gl.int32, LAYOUT))
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(full.index(slot), (i // STAGES) & 1)
        tile, packed = x.index(slot), w.index(slot)
        for block in gl.static_range(BK // 64):
            both = packed.slice(32 * block, 32, dim=1).load(REGISTERS)
            low, high = unpack_low(both, True), unpack_high(both, True)
            acc = warpgroup_mma(low, tile.slice(64 * block, 32, dim=1).permute((1, 0)), acc, is_async=True)
            acc = warpgroup_mma(high, tile.slice(64 * block + 32, 32, dim=1).permute((1, 0)), acc, is_async=True)
        acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
        mbarrier.arrive(empty.index(slot))
    return (warpgroup_mma_wait(0, deps=[acc]) >> 4,)  # every product carries the factor 16 of a nibble kept in the high half


@gluon.jit
def _load_linear(
    x_desc, w_desc, x, w, full, empty, m, n, gate, begin, count, BYTES: gl.constexpr, BK: gl.constexpr, WIDTH: gl.constexpr,
    HALF: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp of a linear layer. HALF: the weights are so many rows from n on, and as many from `gate` on; 0 = all from n on."""
    for i in range(count):
        slot = i % STAGES
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), BYTES)
        copy_tile(x_desc, [m, (begin + i) * BK], full.index(slot), x.index(slot))
        if HALF:
            copy_tile(w_desc, [n, (begin + i) * WIDTH], full.index(slot), w.index(slot).slice(0, HALF, dim=0))
            copy_tile(w_desc, [gate, (begin + i) * WIDTH], full.index(slot), w.index(slot).slice(HALF, HALF, dim=0))
        else:
            copy_tile(w_desc, [n, (begin + i) * WIDTH], full.index(slot), w.index(slot))


@gluon.jit
def _load_conv2d(
    x_desc, w_desc, x, w, full, empty, image, top, left, n, begin, count, BLOCKS,
    KW: gl.constexpr, DH: gl.constexpr, DW: gl.constexpr, BB: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr,
    BYTES: gl.constexpr, BK: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The copying warp of a convolution: block by block of channels, tap by tap."""
    for i in range(count):
        slot = i % STAGES
        tap = (begin + i) // BLOCKS
        row, column = top + tap // KW * DH, left + tap % KW * DW
        mbarrier.wait(empty.index(slot), ((i // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(slot), BYTES)
        box = x.index(slot).reshape([BB, BH, BW, BK])
        copy_tile(x_desc, [image, row, column, (begin + i) % BLOCKS * BK], full.index(slot), box)
        copy_tile(w_desc, [n, (begin + i) * WIDTH], full.index(slot), w.index(slot))


@gluon.constexpr_function
def _sums_layout(columns, warps):
    """Accumulators of `warps` warps along the rows; integer instructions are at most 128 columns wide in this triton."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, min(columns, 128), 32])


@gluon.constexpr_function
def _rows_layout(columns, warps):
    """Eight neighbours of a row to a thread: 16-byte stores of half precision."""
    return gl.BlockedLayout([1, 8], [max(256 // columns, 1), min(columns // 8, 32)], [warps, 1], [1, 0])


@gluon.jit
def _close(full, empty, STAGES: gl.constexpr):
    for s in gl.static_range(STAGES):
        mbarrier.invalidate(full.index(s))
        mbarrier.invalidate(empty.index(s))


@gluon.jit
def _store_share(acc, work_ptr, offs_m, offs_n, M, N):
    share = work_ptr + gl.program_id(1).to(gl.int64) * M * N
    gl.store(share + offs_m[:, None] * N + offs_n[None, :], acc, mask=(offs_m < M)[:, None] & (offs_n < N)[None, :])


@gluon.jit
def _upper_and_lower(acc, BM: gl.constexpr, BN: gl.constexpr):
    """Rows of a tile in two halves, without an exchange between threads."""
    return gl.split(gl.permute(gl.reshape(acc, (2, BM // 2, BN)), (1, 2, 0)))


@gluon.jit(do_not_specialize=["M", "BLOCKS", "BLOCKS_PER_SPLIT"], do_not_specialize_on_alignment=SCALARS)
def linear_kernel(
    x_desc, w_desc, work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, BLOCKS, BLOCKS_PER_SPLIT,
    WIDE: gl.constexpr, PER_ROW: gl.constexpr, TABLES: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr, BITS: gl.constexpr, SPLIT: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, GROUP_M: gl.constexpr, TILE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As `linear_w8a8.triton.linear_kernel`: x [M, K] and w [N, BLOCKS * BK] come by descriptors of their tiles. TILE: layout of x's."""
    WIDTH: gl.constexpr = BK if BITS == 8 else BK // 2
    SUMS: gl.constexpr = _sums_layout(BN if BITS == 8 else BM, WARPS)
    GATED: gl.constexpr = ACTIVATION == "geglu" and not SPLIT
    HALF: gl.constexpr = BN // 2 if GATED else 0
    ROWS: gl.constexpr = _rows_layout(BN // 2 if GATED else BN, WARPS)
    if OVERLAP:
        follow()
    x, w, full, empty = _buffers(x_desc, w_desc, BM, BN, BK, WIDTH, STAGES, TILE)
    tile_m, tile_n = tile_of(M, N, BM, BN, GROUP_M)
    first = tile_n * (HALF if GATED else BN)
    begin = gl.program_id(1) * BLOCKS_PER_SPLIT
    count = gl.maximum(gl.minimum(BLOCKS_PER_SPLIT, BLOCKS - begin), 0)
    # Arguments of partitions are spelt out: in a variable constants would become values.
    if BITS == 8:
        (acc,) = gl.warp_specialize([
            (_multiply, (x, w, full, empty, count, BM, BN, STAGES, SUMS)),
            (_load_linear, (
                x_desc, w_desc, x, w, full, empty, tile_m * BM, first, N // 2 + first, begin, count, BM * BK + BN * WIDTH, BK, WIDTH, HALF,
                STAGES,
            )),
        ], [1], [24])  # fmt: skip
    else:
        (acc,) = gl.warp_specialize([
            (_multiply_packed, (x, w, full, empty, count, BM, BN, BK, STAGES, SUMS)),
            (_load_linear, (
                x_desc, w_desc, x, w, full, empty, tile_m * BM, first, N // 2 + first, begin, count, BM * BK + BN * WIDTH, BK, WIDTH, HALF,
                STAGES,
            )),
        ], [1], [24])  # fmt: skip
        acc = gl.permute(acc, (1, 0))
    _close(full, empty, STAGES)
    offs_m = tile_m * BM + gl.arange(0, BM, layout=gl.SliceLayout(1, ROWS))
    offs_n = first + gl.arange(0, HALF if GATED else BN, layout=gl.SliceLayout(0, ROWS))
    if GATED:
        if BITS == 4 and BN < 32 * WARPS:  # values and gates are sums of different warps
            acc = gl.convert_layout(acc, ROWS)
        # Part by part where they are many, of the columns or, packed weights being sums by columns, of the rows: registers.
        MANY: gl.constexpr = BM * BN >= 4096 * WARPS
        PARTS: gl.constexpr = 1 if not MANY else 4 if BITS == 4 and centre_ptr is not None else 2
        LONG: gl.constexpr = BM // PARTS if BITS == 4 else BM
        COLUMNS: gl.constexpr = HALF if BITS == 4 else HALF // PARTS
        PART: gl.constexpr = _rows_layout(COLUMNS, WARPS)
        for part in gl.static_range(PARTS):
            some = acc
            if BITS == 4 and MANY:
                upper, lower = _upper_and_lower(acc, BM, BN)
                some = upper if part < PARTS // 2 else lower
                if PARTS == 4:
                    upper, lower = _upper_and_lower(some, BM // 2, BN)
                    some = upper if part % 2 == 0 else lower
            value, gate = halves(some, LONG, BN)
            if PARTS == 2 and BITS == 8:
                v0, v1 = halves(value, BM, HALF)
                g0, g1 = halves(gate, BM, HALF)
                value, gate = (v0, g0) if part == 0 else (v1, g1)
            rows = tile_m * BM + (part * LONG if BITS == 4 else 0) + gl.arange(0, LONG, layout=gl.SliceLayout(1, PART))
            columns = first + (part * COLUMNS if BITS == 8 else 0) + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, PART))
            finish_gated(
                gl.convert_layout(value, PART), gl.convert_layout(gate, PART), rows, columns, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr,
                x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW,
                TABLES, HAS_BIAS, HAS_RESIDUAL,
            )  # fmt: skip
    elif SPLIT:
        _store_share(gl.convert_layout(acc, ROWS), work_ptr, offs_m, offs_n, M, N)
    else:
        finish_tile(
            gl.convert_layout(acc, ROWS), offs_m, offs_n, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr,
            w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, WIDE, PER_ROW, TABLES, HAS_BIAS,
            HAS_RESIDUAL, ACTIVATION,
        )  # fmt: skip


@gluon.jit
def _pixels(
    image, top, left, M, OH, OW, BH: gl.constexpr, BW: gl.constexpr, BM: gl.constexpr, ROWS: gl.constexpr
):  # fmt: skip
    """Rows of the output, [BM], of a box of pixels; one outside the image is masked like a row past the last."""
    pixel = gl.arange(0, BM, layout=gl.SliceLayout(1, ROWS))
    row, column = top + pixel // BW % BH, left + pixel % BW
    rows = ((image + pixel // (BH * BW)) * OH + row) * OW + column
    return gl.where((row < OH) & (column < OW), rows, M)


@gluon.jit(do_not_specialize=["M", "H", "W", "OH", "OW", "BLOCKS", "BLOCKS_PER_SPLIT"], do_not_specialize_on_alignment=SCALARS)
def conv2d_kernel(
    x_desc, w_desc, work_ptr, sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr, x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, BLOCKS, BLOCKS_PER_SPLIT,
    KH: gl.constexpr, KW: gl.constexpr, SH: gl.constexpr, SW: gl.constexpr, PH: gl.constexpr, PW: gl.constexpr,
    DH: gl.constexpr, DW: gl.constexpr, WIDE: gl.constexpr, PER_IMAGE: gl.constexpr, TABLES: gl.constexpr,
    HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr, ACTIVATION: gl.constexpr, BITS: gl.constexpr, SPLIT: gl.constexpr,
    BB: gl.constexpr, BH: gl.constexpr, BW: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr,
    STAGES: gl.constexpr, WARPS: gl.constexpr, GROUP_M: gl.constexpr, TILE: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """As `conv2d_w8a8.triton.conv2d_kernel` with stride 1. A tile is a box of BB images, BH rows, BW columns."""
    WIDTH: gl.constexpr = BK if BITS == 8 else BK // 2
    SUMS: gl.constexpr = _sums_layout(BN if BITS == 8 else BM, WARPS)
    ROWS: gl.constexpr = _rows_layout(BN, WARPS)
    if OVERLAP:
        follow()
    x, w, full, empty = _buffers(x_desc, w_desc, BM, BN, BK, WIDTH, STAGES, TILE)
    boxes_h, boxes_w = gl.cdiv(OH, BH), gl.cdiv(OW, BW)
    boxes = gl.cdiv(M, OH * OW * BB) * boxes_h * boxes_w
    box, tile_n = tile_of(boxes * BM, N, BM, BN, GROUP_M)
    image, top, left = box // (boxes_h * boxes_w) * BB, box // boxes_w % boxes_h * BH, box % boxes_w * BW
    begin = gl.program_id(1) * BLOCKS_PER_SPLIT
    count = gl.maximum(gl.minimum(BLOCKS_PER_SPLIT, KH * KW * BLOCKS - begin), 0)
    # Arguments of partitions are spelt out: in a variable constants would become values.
    if BITS == 8:
        (acc,) = gl.warp_specialize([
            (_multiply, (x, w, full, empty, count, BM, BN, STAGES, SUMS)),
            (_load_conv2d, (
                x_desc, w_desc, x, w, full, empty, image, top - PH, left - PW, tile_n * BN, begin, count, BLOCKS, KW, DH, DW, BB, BH, BW,
                BM * BK + BN * WIDTH, BK, WIDTH, STAGES,
            )),
        ], [1], [24])  # fmt: skip
    else:
        (acc,) = gl.warp_specialize([
            (_multiply_packed, (x, w, full, empty, count, BM, BN, BK, STAGES, SUMS)),
            (_load_conv2d, (
                x_desc, w_desc, x, w, full, empty, image, top - PH, left - PW, tile_n * BN, begin, count, BLOCKS, KW, DH, DW, BB, BH, BW,
                BM * BK + BN * WIDTH, BK, WIDTH, STAGES,
            )),
        ], [1], [24])  # fmt: skip
        acc = gl.permute(acc, (1, 0))
    _close(full, empty, STAGES)
    if SPLIT:
        acc = gl.convert_layout(acc, ROWS)
        offs_m = _pixels(image, top, left, M, OH, OW, BH, BW, BM, ROWS)
        offs_n = tile_n * BN + gl.arange(0, BN, layout=gl.SliceLayout(0, ROWS))
        _store_share(acc, work_ptr, offs_m, offs_n, M, N)
    else:
        # Halves of whole filters, one after the other: the sums of the border take as many registers as the products.
        HALVES: gl.constexpr = 2 if (128 if BITS == 8 else 32 * WARPS) <= BN else 1
        PART: gl.constexpr = _rows_layout(BN // HALVES, WARPS)
        offs_m = _pixels(image, top, left, M, OH, OW, BH, BW, BM, PART)
        offs_n = tile_n * BN + gl.arange(0, BN // HALVES, layout=gl.SliceLayout(0, PART))
        for half in gl.static_range(HALVES):
            part = acc
            if HALVES == 2:
                first, second = gl.split(gl.permute(gl.reshape(acc, (BM, 2, BN // 2)), (0, 2, 1)))
                part = first if half == 0 else second
            finish_pixels(
                gl.convert_layout(part, PART), offs_m, offs_n + half * (BN // 2), sums_ptr, centre_ptr, x_sums_ptr, x_scale_ptr,
                x_zero_ptr, step_ptr, w_scale_ptr, bias_ptr, residual_ptr, out_scale_ptr, out_zero_ptr, out_ptr, M, N, H, W, OH, OW, KH,
                KW, SH, SW, PH, PW, DH, DW, WIDE, PER_IMAGE, TABLES, HAS_BIAS, HAS_RESIDUAL, ACTIVATION,
            )  # fmt: skip


def box_of(rows: int, size: tuple[int, int, int]) -> Box:
    """Images, rows and columns, powers of two, of a box of `rows` pixels that wastes least on `size`, [B, OH, OW]; the widest of equals."""

    def waste(box: Box) -> int:
        covered = 1
        for part, whole in zip(box, size, strict=True):
            covered *= -(-whole // part) * part
        return covered

    sides = [1 << i for i in range(rows.bit_length())]
    boxes = [(rows // (h * w), h, w) for w in reversed(sides) for h in reversed(sides) if h * w <= rows]
    return min(boxes, key=waste)


def linear_call(x: Tensor, weight: Tensor, split: bool, flags: tuple[Any, ...], kind: tuple[Any, ...], plan: Plan) -> Call:
    """Launch of `linear_kernel`; arguments as the general kernel has them (`linear_w8a8.triton`)."""
    tile, splits, m, (n, width), bits = plan.tile, plan.splits, x.shape[0], weight.shape, _bits(weight)
    blocks, columns = width * 8 // bits // tile.bk, tile.bk * bits // 8
    rows = tile.bn // 2 if flags[-1] == GATED and not split else tile.bn
    constants = (
        *flags, bits, split, tile.bm, tile.bn, tile.bk, tile.stages, tile.warps, GROUP_M, _layout(tile.bk, 2), overlaps(x.device),
    )  # fmt: skip

    def boxes(x: Tensor, weight: Tensor, *others: Any) -> tuple[TensorDescriptor, ...]:
        return _rows(x.view(m, -1), tile.bm, tile.bk), _rows(weight, rows, columns)

    return Call(
        linear_kernel, (cdiv(m, tile.bm) * cdiv(n, tile.bn), splits, 1),
        ("linear tma", x.device.index, constants, kind, tile, n % 16 == 0, n == 1),
        (m, n, blocks, -(-blocks // splits), *constants), _options(tile), boxes,
    )  # fmt: skip


def conv2d_call(
    x: Tensor, weight: Tensor, split: bool, flags: tuple[Any, ...], kind: tuple[Any, ...], plan: Plan, geometry: Conv2dGeometry, size: Pair
) -> Call:
    """Launch of `conv2d_kernel`; arguments as the general kernel has them (`conv2d_w8a8.triton`)."""
    tile, splits, g, bits = plan.tile, plan.splits, geometry, _bits(weight)
    (b, h, w, c), (n, kh, kw, width) = x.shape, weight.shape
    box = box_of(tile.bm, (b, *size))
    tiles = cdiv(b, box[0]) * cdiv(size[0], box[1]) * cdiv(size[1], box[2])
    blocks, columns = width * 8 // bits // tile.bk, tile.bk * bits // 8
    constants = (
        kh, kw, *g.stride, *g.padding, *g.dilation, *flags, bits, split, *box, tile.bm, tile.bn, tile.bk, tile.stages, tile.warps, GROUP_M,
        _layout(tile.bk, 2), overlaps(x.device),
    )  # fmt: skip

    def boxes(x: Tensor, weight: Tensor, *others: Any) -> tuple[TensorDescriptor, ...]:
        pixels = TensorDescriptor(x, [b, h, w, c], [h * w * c, w * c, c, 1], [*box, tile.bk], _layout(tile.bk, 4))
        return pixels, _rows(weight.flatten(1), tile.bn, columns)

    return Call(
        conv2d_kernel, (tiles * cdiv(n, tile.bn), splits, 1),
        ("conv2d tma", x.device.index, constants, kind, tile, n % 16 == 0, n == 1),
        (b * size[0] * size[1], n, h, w, *size, blocks, -(-kh * kw * blocks // splits), *constants), _options(tile), boxes,
    )  # fmt: skip


def _bits(weight: Tensor) -> int:
    return 8 if weight.dtype == torch.int8 else 4


def _options(tile: Tile) -> dict[str, Any]:
    return {"num_warps": tile.warps, "maxnreg": tile.registers, "launch_pdl": True}


def _rows(t: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Tiles of a contiguous matrix. torch leaves any stride to an axis of one entry, the copy engine wants multiples of 16 bytes."""
    return TensorDescriptor(t, list(t.shape), [t.shape[1], 1], [rows, columns], _layout(columns, 2))


def _layout(width: int, rank: int) -> gl.NVMMASharedLayout:
    """Rows of `width` bytes, at least 32, as the tensor cores read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(width, 128), element_bitwidth=8, rank=rank)
