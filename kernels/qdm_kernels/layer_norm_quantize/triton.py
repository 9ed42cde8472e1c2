"""LayerNorm to codes on CUDA GPUs: whole rows in registers, read once, written as bytes."""

# mypy: disable-error-code="assignment"
# (a kernel's tuples grow, and triton takes no annotation of one)

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.triton import magnitude, pick, scale_of_row, to_codes
from qdm_kernels.gemm import tiles
from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, overlaps, tensors_of, variant
from qdm_kernels.producer import plain_floats, tables_of
from qdm_kernels.quantize.reference import SMALLEST_ROW

LONGEST_ROW = 16384  # entries held in registers
_PART = 1024  # entries of the rows that 4 warps read together
_WARPS = 16  # of a multiprocessor that run at once, at 128 registers per thread
_ready: Ready[Call] = Ready(4096)


@triton.jit
def _mask(row_ok, k_ok, LAST: tl.constexpr, EVEN: tl.constexpr):
    """Which entries of a part exist, [R, 1] or [R, P]: only the last part of a row can be short, and is not where EVEN."""
    return row_ok[:, None] & k_ok[None, :] if LAST and not EVEN else row_ok[:, None]


@triton.jit
def _rows(x_ptr, inside, row_ok, k_ok, P: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr):
    """PARTS of R rows, [R, P] each, as they are; 0 after a row's end."""
    found = ()
    for p in tl.static_range(PARTS):
        found += (tl.load(x_ptr + p * P + inside, mask=_mask(row_ok, k_ok, p + 1 == PARTS, EVEN), other=0.0),)
    return found


@triton.jit
def _columns(ptr, columns, K, THERE: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr):
    """As `_rows`, of one row that all rows share; without THERE, nothing to be used. In the layout of the rows: nothing is exchanged."""
    found = ()
    for p in tl.static_range(PARTS):
        found += (tl.load(ptr + p * P + columns, mask=p * P + columns < K, other=0.0) if THERE else 0.0,)
    return found


@triton.jit(do_not_specialize=["ROWS_PER_SAMPLE", "COUNT"])  # a new resolution compiles nothing
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, m_ptr, shift_ptr, gain_ptr, scale_ptr, zero_ptr, step_ptr, row_scale_ptr, out_ptr, K, ROWS_PER_SAMPLE,
    COUNT, EPS,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr, HAS_GAIN: tl.constexpr, GAIN_TABLE: tl.constexpr,
    TABLES: tl.constexpr, DYNAMIC: tl.constexpr, SMALLEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    R: tl.constexpr, P: tl.constexpr, PARTS: tl.constexpr, EVEN: tl.constexpr, AHEAD: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """COUNT times R rows of one sample, each in PARTS of P columns: x [samples, ROWS_PER_SAMPLE, K] -> codes.

    m, shift [samples, K]; gain [K] or [S, K]. EVEN: K = PARTS P. AHEAD: the next R rows are on their way while R are computed.
    Instructions, not bytes, are what runs short: what all rows share is combined once, and multiply-adds are written as one.
    """
    if OVERLAP:
        follow()
    SCALED: tl.constexpr = HAS_WEIGHT or MODULATED or HAS_GAIN
    SHIFTED: tl.constexpr = HAS_BIAS or MODULATED
    programs = tl.cdiv(ROWS_PER_SAMPLE, COUNT * R)
    sample = (tl.program_id(0) // programs).to(tl.int64)
    first = tl.program_id(0) % programs * (COUNT * R)
    last = tl.minimum(first + COUNT * R, ROWS_PER_SAMPLE)
    r, k = tl.arange(0, R), tl.arange(0, P)
    columns = tl.broadcast_to(k[None, :], (R, P))
    inside = r[:, None] * K + columns
    k_ok = (PARTS - 1) * P + k < K
    start = (sample * ROWS_PER_SAMPLE + first) * K

    if AHEAD:
        ahead = _rows(x_ptr + start, inside, first + r < last, k_ok, P, PARTS, EVEN)
    # whatever waits for the step's number comes last
    weight, bias = _columns(weight_ptr, columns, K, HAS_WEIGHT, P, PARTS), _columns(bias_ptr, columns, K, HAS_BIAS, P, PARTS)
    m = _columns(m_ptr + sample * K if MODULATED else m_ptr, columns, K, MODULATED, P, PARTS)
    shift = _columns(shift_ptr + sample * K if MODULATED else shift_ptr, columns, K, MODULATED, P, PARTS)
    gain = _columns(gain_ptr + tl.load(step_ptr) * K if GAIN_TABLE else gain_ptr, columns, K, HAS_GAIN, P, PARTS)
    if DYNAMIC:
        zero_point = tl.full((), 0, tl.int32)
    else:
        inverse, zero_point = tl.div_rn(1.0, pick(scale_ptr, step_ptr, TABLES & 1)), pick(zero_ptr, step_ptr, TABLES & 2)
    factor, offset = (), ()
    for p in tl.static_range(PARTS):
        f = weight[p].to(tl.float32) if HAS_WEIGHT else 1.0
        o = bias[p].to(tl.float32) if HAS_BIAS else 0.0
        if MODULATED:
            f, o = f * (1.0 + m[p].to(tl.float32)), o * (1.0 + m[p].to(tl.float32)) + shift[p].to(tl.float32)
        if HAS_GAIN:
            f, o = f * gain[p], o * gain[p]
        factor += (f,)
        offset += (o,)

    inverse_k = 1.0 / K
    for row in range(first, last, R):
        row_ok = row + r < last
        x = ahead if AHEAD else _rows(x_ptr + start, inside, row_ok, k_ok, P, PARTS, EVEN)
        wide, total = (x[0].to(tl.float32),), x[0].to(tl.float32)
        for p in tl.static_range(1, PARTS):
            wide += (x[p].to(tl.float32),)
            total += wide[p]
        if AHEAD:
            ahead = _rows(x_ptr + start + R * K, inside, row + R + r < last, k_ok, P, PARTS, EVEN)
        mean = (tl.sum(total, axis=1) * inverse_k)[:, None]
        squares, centred = tl.zeros((R, P), tl.float32), ()
        for p in tl.static_range(PARTS):
            c = wide[p] - mean
            if p + 1 == PARTS and not EVEN:
                c = tl.where(k_ok[None, :], c, 0.0)
            centred += (c,)
            squares = tl.fma(c, c, squares)
        inverse_std = tl.rsqrt(tl.sum(squares, axis=1) * inverse_k + EPS)[:, None]
        y, largest = (), tl.zeros((R, P), tl.int32)
        for p in tl.static_range(PARTS):
            v = centred[p] * inverse_std
            if SCALED and SHIFTED:
                v = tl.fma(v, factor[p], offset[p])
            elif SCALED:
                v *= factor[p]
            elif SHIFTED:
                v += offset[p]
            y += (v,)
            if DYNAMIC:
                largest = tl.maximum(largest, magnitude(v))
        if DYNAMIC:
            scale, inverse = scale_of_row(tl.max(largest, axis=1), SMALLEST, HIGH)
            tl.store(row_scale_ptr + sample * ROWS_PER_SAMPLE + row + r, scale, mask=row_ok)
            inverse = inverse[:, None]
        for p in tl.static_range(PARTS):
            codes = to_codes(y[p], inverse, zero_point, LOW, HIGH)
            tl.store(out_ptr + start + p * P + inside, codes, mask=_mask(row_ok, k_ok, p + 1 == PARTS, EVEN))
        start += R * K


def why_not(k: int) -> str | None:
    """Why the kernel does not take rows of k entries; None = it does."""
    return None if 0 < k <= LONGEST_ROW else f"rows of {k} entries; the kernel holds 1 to {LONGEST_ROW} in registers"


def normalize_quantize(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float,
    scale: Tensor | None, zero_point: Tensor | None, step: Tensor | None, bits: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Codes int8 of the shape of x; scale None = per row, then also float32 [..., 1]."""
    m, shift = modulation or (None, None)
    x, weight, bias, m, shift, gain, scale = plain_floats(x, weight, bias, m, shift, gain, scale)
    out = torch.empty_like(x, dtype=torch.int8)
    row_scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device) if scale is None else None
    if x.numel() == 0:
        return out, row_scale
    tensors = (x, weight, bias, m, shift, gain, scale, zero_point, step, row_scale, out)
    gain_table, tables = gain is not None and gain.dim() == 2, tables_of(scale, zero_point, step)
    key = (x.get_device(), x.shape, tensors_of(tensors), gain_table, tables, eps, bits)
    call = _ready.get(key)
    if call is None:
        call = _ready.keep(key, _call(tensors, gain_table, tables, eps, bits))
    call(*tensors)
    return out, row_scale


def _call(tensors: tuple[Tensor | None, ...], gain_table: bool, tables: int, eps: float, bits: int) -> Call:
    x, weight, bias, m, _, gain, scale, *_ = tensors
    assert x is not None
    k = x.shape[-1]
    samples = 1 if m is None else x.shape[0]
    rows = x.numel() // (k * samples)
    part, parts, at_once, warps = _tile(k)
    # every program at once on the GPU, and a sample's rows on as few as that takes: fewer readings of its weights
    capacity = max(1, tiles.processors(x.device)[1] * _WARPS // (warps * samples))
    count = cdiv(cdiv(rows, at_once), capacity)
    constants = (
        weight is not None, bias is not None, m is not None, gain is not None, gain_table, tables, scale is None, SMALLEST_ROW,
        -(1 << bits - 1), (1 << bits - 1) - 1, at_once, part, parts, part * parts == k, warps < 16, overlaps(x.device),
    )  # fmt: skip
    return Call(
        layer_norm_kernel, (samples * cdiv(rows, at_once * count), 1, 1),
        ("layer norm", x.device.index, variant(*tensors, k), constants), (k, rows, count, eps, *constants),
        {"num_warps": warps, "launch_pdl": constants[-1]},
    )  # fmt: skip


def _tile(k: int) -> tuple[int, int, int, int]:
    """(columns of a part, parts of a row, rows at once, warps): up to three parts, so that few threads have none of a row's entries.

    A thread reads 8 entries side by side of each part; rows of more than 6144 take all the warps there are, with more per thread.
    """
    part = max(8, triton.next_power_of_2(cdiv(k, 3)))
    at_once = max(1, _PART // part)
    return part, cdiv(k, part), at_once, max(4, min(16, at_once * part // 256))
