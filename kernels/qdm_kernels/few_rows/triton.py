"""Weight-only linear layers of few rows, in Gluon: weights go from memory to the registers of the tensor cores and nowhere else.

Such a layer costs the time in which its weights are read. They are stored in the order in which the lanes of a warp hold the left
operand of `mma.m16n8k16`: 16 outputs by one block of inputs are 512 bytes, 16 to a lane, so that every load is one line of memory and
nothing passes through shared memory. Loads of several chunks are under way at once, the first of them before the kernel waits for its
predecessor: no kernel that lets another start early writes weights.

A word of 16 bits holds the codes of PLANES inputs: four of 4 bits plus 8, or two of 8 bits. Block b, plane p, lane t of four, r and i of
two: input `b * 16 PLANES + t * 4 PLANES + p * 4 + 2 r + i`, so that a lane reads its inputs of x by 16 bytes as well. Words become
operands by exact bit arithmetic: `nibble | 0x4300` is the bfloat16 number 128 + nibble, `nibble | 0x6400` the float16 number
1024 + nibble; bytes give 8 bits to a float16 number at once, to a bfloat16 number 7 and the sign.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from qdm_kernels.epilogue.triton import store
from qdm_kernels.gemm.tiles import Tile, aligned, cdiv
from qdm_kernels.gemm.triton import Call, follow, overlaps, tensors_of, variant

OUTPUTS = 16  # of one warp
COLUMNS = 8  # rows of one program
_REGISTERS = 168  # per thread: left to itself the compiler spills to stay at 128
_WASTE = 1.125  # most stored inputs by inputs for the longest chunk


@gluon.constexpr_function
def _bits_of(first, count, axis, rank):
    """Bases of a linear layout: `count` bits of an axis, from its index `first` up."""
    return [[(first << i) if a == axis else 0 for a in range(rank)] for i in range(count)]


@gluon.constexpr_function
def _log2(value):
    return value.bit_length() - 1


@gluon.constexpr_function
def _stored_layout(warps, unroll):
    """[warps, unroll * 128] pairs of words: a lane's 4 pairs of every block in its registers."""
    return gl.DistributedLinearLayout(
        reg_bases=_bits_of(1, 2, 1, 2) + _bits_of(128, _log2(unroll), 1, 2), lane_bases=_bits_of(4, 5, 1, 2),
        warp_bases=_bits_of(1, _log2(warps), 0, 2), block_bases=[], shape=[warps, unroll * 128],
    )  # fmt: skip


@gluon.constexpr_function
def _rows_layout(warps, unroll, planes):
    """[8, unroll * 8 planes] pairs of x: the same in every warp."""
    width = 2 * planes
    return gl.DistributedLinearLayout(
        reg_bases=_bits_of(1, _log2(width), 1, 2) + _bits_of(4 * width, _log2(unroll), 1, 2),
        lane_bases=_bits_of(width, 2, 1, 2) + _bits_of(1, 3, 0, 2), warp_bases=[[0, 0]] * _log2(warps), block_bases=[],
        shape=[8, unroll * 4 * width],
    )  # fmt: skip


@gluon.constexpr_function
def _unpacking(bits, kind):
    """PTX of two words $P and their offsets $P+1 -> the PLANES = 16 / bits operands of both, $0 .. $P-1."""
    planes = 16 // bits
    one, minus, magic = ("0x3F803F80", "0xBF80BF80", "0x43004300") if kind == "bf16" else ("0x3C003C00", "0xBC00BC00", "0x64006400")
    fma = f"fma.rn.{'bf16x2' if kind == 'bf16' else 'f16x2'}"
    lines = ["{ .reg .b32 w, s, one, minus;", f"mov.b32 one, {one};", f"mov.b32 minus, {minus};"]
    for p in range(planes):
        lines.append(f"shr.u32 w, ${planes}, {bits * p};" if p else f"mov.b32 w, ${planes};")
        if bits == 4:
            lines.append(f"lop3.b32 ${p}, w, 0x000F000F, {magic}, 0xEA;")  # (w & mask) | magic
        elif kind == "fp16":
            lines.append(f"lop3.b32 ${p}, w, 0x00FF00FF, 0x64806480, 0x6A;")  # (w & mask) ^ magic: 1024 + code + 128
        else:
            lines.append(f"lop3.b32 ${p}, w, 0x007F007F, {magic}, 0xEA;")
            lines.append(f"lop3.b32 s, w, 0x00800080, {magic}, 0xEA;")  # 128, or 256 where the code is negative
            lines.append(f"{fma} ${p}, s, minus, ${p};")
        lines.append(f"{fma} ${p}, ${p}, one, ${planes + 1};")
    return " ".join(lines) + " }"


@gluon.constexpr_function
def _constraints(bits):
    return ",".join(["=&r"] * (16 // bits) + ["r", "r"])


@gluon.constexpr_function
def _offset_of_zero(bits, kind):
    """What the bit arithmetic adds to code minus zero point."""
    return (128 if kind == "bf16" else 1024) + 8 if bits == 4 else (0 if kind == "bf16" else 1152)


@gluon.jit
def _halves(words):
    """int32 [...] -> int16 [..., 2], no instruction: pairs that live in one register of a loop are torn apart and glued together again."""
    return gl.join(words.to(gl.int16), (words >> 16).to(gl.int16))


@gluon.jit
def _multiply(words, x, offset, one, two, BITS: gl.constexpr, KIND: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr):
    """One chunk: words as stored, x as read, offset of the rows of the left operand. Sums of even planes join `one`, of odd ones `two`."""
    SUMS: gl.constexpr = one.type.layout
    LEFT: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    RIGHT: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    PLANES: gl.constexpr = 16 // BITS
    w = _halves(words).reshape([WARPS, UNROLL, 8, 4, 2, 2, 2]).permute([0, 5, 2, 1, 4, 3, 6]).reshape([16 * WARPS, 16 * UNROLL])
    w, shift = gl.convert_layout(w, LEFT), gl.expand_dims(offset, 1)
    planes = (
        _halves(x)
        .to(offset.dtype, bitcast=True)
        .reshape([8, UNROLL, 4, PLANES, 2, 2])
        .permute([1, 4, 2, 5, 0, 3])
        .reshape([16 * UNROLL, 8, PLANES // 2, 2])
    )
    even, odd = gl.split(planes)
    if BITS == 4:
        w0, w1, w2, w3 = gl.inline_asm_elementwise(
            _unpacking(BITS, KIND),
            _constraints(BITS),
            [w, shift],
            dtype=(offset.dtype, offset.dtype, offset.dtype, offset.dtype),
            is_pure=True,
            pack=2,
        )
        x0, x2 = gl.split(even)
        x1, x3 = gl.split(odd)
        one, two = mma_v2(w0, gl.convert_layout(x0, RIGHT), one), mma_v2(w1, gl.convert_layout(x1, RIGHT), two)
        one, two = mma_v2(w2, gl.convert_layout(x2, RIGHT), one), mma_v2(w3, gl.convert_layout(x3, RIGHT), two)
    else:
        w0, w1 = gl.inline_asm_elementwise(
            _unpacking(BITS, KIND), _constraints(BITS), [w, shift], dtype=(offset.dtype, offset.dtype), is_pure=True, pack=2
        )
        x0, x1 = even.reshape([16 * UNROLL, 8]), odd.reshape([16 * UNROLL, 8])
        one, two = mma_v2(w0, gl.convert_layout(x0, RIGHT), one), mma_v2(w1, gl.convert_layout(x1, RIGHT), two)
    return one, two


@gluon.jit(do_not_specialize=["M", "CHUNKS"])
def few_rows_kernel(
    x_ptr, w_ptr, scale_ptr, zero_ptr, bias_ptr, residual_ptr, out_ptr, M, N, K, CHUNKS,
    GROUPED: gl.constexpr, BITS: gl.constexpr, KIND: gl.constexpr, HAS_BIAS: gl.constexpr, HAS_RESIDUAL: gl.constexpr,
    ACTIVATION: gl.constexpr, WARPS: gl.constexpr, UNROLL: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """16 WARPS outputs of 8 rows: x int32 [M, K] pairs, w int32 [ceil(N / 16), CHUNKS, UNROLL, 128], scale, zero [N, G] -> out [M, N].

    GROUPED: a chunk is a group with a scale of its own; else G = 1.
    """
    PLANES: gl.constexpr = 16 // BITS
    CHUNK: gl.constexpr = UNROLL * 16 * PLANES  # inputs
    STORED: gl.constexpr = _stored_layout(WARPS, UNROLL)
    ROWS: gl.constexpr = _rows_layout(WARPS, UNROLL, PLANES)
    SUMS: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, 8])
    LEFT: gl.constexpr = gl.SliceLayout(1, gl.DotOperandLayout(0, SUMS, 2))
    FLOAT: gl.constexpr = gl.bfloat16 if KIND == "bf16" else gl.float16

    first = gl.program_id(0) * WARPS
    tiles = gl.cdiv(N, 16)
    tile = gl.minimum(first + gl.arange(0, WARPS, layout=gl.SliceLayout(1, STORED)), tiles - 1)
    word = gl.arange(0, UNROLL * 128, layout=gl.SliceLayout(0, STORED))
    w_tile = w_ptr + tile.to(gl.int64)[:, None] * (CHUNKS * UNROLL * 128) + word[None, :]
    # three chunks of weights are under way while a fourth is multiplied
    w0 = gl.load(w_tile)
    w1 = gl.load(w_tile + UNROLL * 128, mask=CHUNKS > 1)
    w2 = gl.load(w_tile + 2 * UNROLL * 128, mask=CHUNKS > 2)
    if OVERLAP:
        follow()
    m = gl.program_id(1) * 8 + gl.arange(0, 8, layout=gl.SliceLayout(1, ROWS))
    k = gl.arange(0, CHUNK // 2, layout=gl.SliceLayout(0, ROWS))
    x_tile, m_ok = x_ptr + m.to(gl.int64)[:, None] * K + k[None, :], (m < M)[:, None]
    x0 = gl.load(x_tile, mask=m_ok & (k < K)[None, :], other=0)
    n = first * 16 + gl.arange(0, 16 * WARPS, layout=LEFT)
    n_out = first * 16 + gl.arange(0, 16 * WARPS, layout=gl.SliceLayout(1, SUMS))
    at_offset, at_scale = gl.minimum(n, N - 1), gl.minimum(n_out, N - 1)
    if GROUPED:
        at_offset, at_scale = at_offset * CHUNKS, at_scale * CHUNKS
    shift: gl.constexpr = _offset_of_zero(BITS, KIND)
    offset = (-(gl.load(zero_ptr + at_offset).to(gl.float32) + shift)).to(FLOAT)

    one = gl.zeros([16 * WARPS, 8], gl.float32, SUMS)
    two = gl.zeros([16 * WARPS, 8], gl.float32, SUMS)
    for chunk in range(CHUNKS):
        w, x = w0, x0
        w0, w1 = w1, w2
        w2 = gl.load(w_tile + (chunk + 3) * (UNROLL * 128), mask=chunk + 3 < CHUNKS)
        x0 = gl.load(x_tile + (chunk + 1) * (CHUNK // 2), mask=m_ok & ((chunk + 1) * (CHUNK // 2) + k < K)[None, :], other=0)
        if GROUPED:
            offset = (-(gl.load(zero_ptr + at_offset + chunk).to(gl.float32) + shift)).to(FLOAT)
            zero = gl.zeros([16 * WARPS, 8], gl.float32, SUMS)
            first_part, second_part = _multiply(w, x, offset, zero, zero, BITS, KIND, WARPS, UNROLL)
            one += (first_part + second_part) * gl.load(scale_ptr + at_scale + chunk)[:, None]
        else:
            one, two = _multiply(w, x, offset, one, two, BITS, KIND, WARPS, UNROLL)
    acc = one if GROUPED else (one + two) * gl.load(scale_ptr + at_scale)[:, None]

    n_ok = n_out < N
    if HAS_BIAS:
        acc += gl.load(bias_ptr + n_out, mask=n_ok, other=0.0)[:, None]
    m_out = gl.program_id(1) * 8 + gl.arange(0, 8, layout=gl.SliceLayout(0, SUMS))
    at = m_out.to(gl.int64)[None, :] * N + n_out[:, None]
    store(acc, out_ptr, residual_ptr, None, None, None, at, n_ok[:, None] & (m_out < M)[None, :], ACTIVATION, HAS_RESIDUAL, False, False)


def block_inputs(bits: int) -> int:
    """Inputs of a block: 512 bytes of 16 outputs."""
    return 16 * (16 // bits)


def chunk_inputs(k: int, bits: int, group: int) -> int:
    """Inputs of a chunk, what one turn of the kernel's loop reads: a group of scales, else up to four blocks. group: 0 = none."""
    block = block_inputs(bits)
    return group or next(block * blocks for blocks in (4, 2, 1) if blocks == 1 or cdiv(k, block * blocks) * block * blocks <= _WASTE * k)


def pack(codes: Tensor, bits: int, chunk: int) -> Tensor:
    """Codes int8 [N, K] in the order of the lanes: int32 [ceil(N / 16), ceil(K / chunk) * chunk / block, 128]."""
    (n, k), planes = codes.shape, 16 // bits
    padded = F.pad(codes, (0, -k % chunk, 0, -n % OUTPUTS))
    # tile, r of rows, g, block, t, plane, r of inputs, i -> tile, block, g, t, r of inputs, r of rows, i, plane
    split = padded.view(-1, 2, 8, padded.shape[1] // block_inputs(bits), 4, planes, 2, 2).permute(0, 3, 2, 4, 6, 1, 7, 5).to(torch.int32)
    unsigned = split + 8 if bits == 4 else split & 0xFF
    halves = sum(unsigned[..., p] << bits * p for p in range(planes))
    return (halves[..., 0] | halves[..., 1] << 16).flatten(2).contiguous()


def unpack(words: Tensor, bits: int, outputs: int, inputs: int) -> Tensor:
    """Inverse of `pack`: int8 [N, K]."""
    planes = 16 // bits
    # shifts are numbers: a tensor of them would be a copy from the CPU, which no graph captures
    found = torch.stack([words >> 16 * i + bits * p for i in range(2) for p in range(planes)], -1) & (1 << bits) - 1
    codes = (found - 8 if bits == 4 else found).to(torch.int8)
    split = codes.view(len(words), -1, 8, 4, 2, 2, 2, planes).permute(0, 5, 2, 1, 3, 7, 4, 6)
    return split.reshape(len(words) * OUTPUTS, -1)[:outputs, :inputs]


def run(
    x: Tensor, state: Any, bias: Tensor | None, activation: str, residual: Tensor | None, dtype: torch.dtype, tile: Tile
) -> Tensor:  # fmt: skip
    """x bfloat16 or float16 [M, K] -> [M, N] of a dtype. state: of `linear_w4a16.triton`, words of `pack`; tile: only its warps count."""
    pairs = aligned(F.pad(x, (0, -x.shape[1] % 32)) if x.shape[1] % 32 else x).view(torch.int32)
    out = torch.empty((len(x), state.outputs), dtype=dtype, device=x.device)
    tensors = (pairs, state.words, state.scale, state.zero_point, bias, residual, out)
    key = (len(x), x.dtype, tile.warps, activation, tensors_of(tensors))
    call = state.ready.get(key)
    if call is None:
        call = state.ready.keep(key, _call(x, tensors, state, activation, tile.warps))
    call(*tensors)
    return out


def _call(x: Tensor, tensors: tuple[Tensor | None, ...], state: Any, activation: str, warps: int) -> Call:
    """The launch of `run` for these tensors."""
    pairs, words, *_, bias, residual, _ = tensors
    assert pairs is not None
    assert words is not None
    unroll, overlap = state.chunk // block_inputs(state.bits), overlaps(x.device)
    sizes = (len(x), state.outputs, pairs.shape[1], words.shape[1] // unroll)
    constants = (
        state.scale.shape[1] > 1, state.bits, "bf16" if x.dtype == torch.bfloat16 else "fp16", bias is not None, residual is not None,
        activation, warps, unroll, overlap,
    )  # fmt: skip
    return Call(
        few_rows_kernel, (cdiv(len(words), warps), cdiv(len(x), COLUMNS), 1),
        ("few rows", x.device.index, variant(*tensors, *sizes[1:3]), constants), (*sizes, *constants),
        {"num_warps": warps, "maxnreg": _REGISTERS, "launch_pdl": overlap},
    )  # fmt: skip
