"""RMSNorm and rotation of heads on CUDA GPUs: one launch reads queries, keys and values where they lie, writes them where they belong."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, overlaps, tensors_of, variant
from qdm_kernels.producer import plain_floats

WIDEST_HEAD = 512  # entries held in registers
_MOST_HEADS = 8  # of a program
_ENTRIES = 1024  # of a program's tokens in one head: 16 bytes of bfloat16 per thread
_ready: Ready[Call] = Ready(4096)


@triton.jit
def _turn(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, at, to, angle, mask, EPS, HAS_WEIGHT: tl.constexpr, D: tl.constexpr,
    HB: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """HB heads of tokens [BT, D], one after the other with the same cos and sin; the next one is on its way while one is computed."""
    ahead = tl.load(x_ptr + at, mask=mask, other=0.0)
    cos, sin = tl.load(cos_ptr + angle, mask=mask, other=0.0), tl.load(sin_ptr + angle, mask=mask, other=0.0)
    if HAS_WEIGHT:
        d = tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    for h in tl.static_range(HB):
        x = ahead.to(tl.float32)
        if h + 1 < HB:
            ahead = tl.load(x_ptr + at + (h + 1) * D, mask=mask, other=0.0)
        y = x * tl.rsqrt(tl.sum(x * x, axis=1) / D + EPS)[:, None]
        if HAS_WEIGHT:
            y *= weight
        even, odd = tl.split(tl.reshape(y, (BT, BLOCK // 2, 2)))
        y = y * cos + tl.reshape(tl.join(-odd, even), (BT, BLOCK)) * sin
        tl.store(out_ptr + to + h * D, y.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy(x_ptr, out_ptr, at, to, mask, D: tl.constexpr, HB: tl.constexpr):
    """HB heads as they are, two under way."""
    ahead = tl.load(x_ptr + at, mask=mask)
    for h in tl.static_range(HB):
        x = ahead
        if h + 1 < HB:
            ahead = tl.load(x_ptr + at + (h + 1) * D, mask=mask)
        tl.store(out_ptr + to + h * D, x.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["TOKENS", "TOTAL", "AT"])  # a new resolution compiles nothing
def rms_norm_rotary_kernel(
    q_ptr, k_ptr, v_ptr, q_weight_ptr, k_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, v_out_ptr, TOKENS, TOTAL, AT,
    SAMPLE_STRIDE, TOKEN_STRIDE, EPS,
    HEADS: tl.constexpr, D: tl.constexpr, Q_WEIGHT: tl.constexpr, K_WEIGHT: tl.constexpr, HB: tl.constexpr, BT: tl.constexpr,
    BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """HB heads of BT tokens: q, k, v [B, TOKENS, HEADS D] by strides -> rows AT.. of [B, TOTAL, HEADS, D]. cos, sin [TOTAL, D]."""
    if OVERLAP:
        follow()
    CHUNKS: tl.constexpr = HEADS // HB
    sample = tl.program_id(2).to(tl.int64)
    part, first = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS * (HB * D)
    t, d = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, BLOCK)
    mask = (t < TOKENS)[:, None] & (d < D)[None, :]
    at = sample * SAMPLE_STRIDE + t.to(tl.int64)[:, None] * TOKEN_STRIDE + first + d[None, :]
    to = (sample * TOTAL + AT + t)[:, None] * (HEADS * D) + first + d[None, :]
    angle = (AT + t)[:, None] * D + d[None, :]
    if part == 0:
        _turn(q_ptr, q_weight_ptr, cos_ptr, sin_ptr, q_out_ptr, at, to, angle, mask, EPS, Q_WEIGHT, D, HB, BT, BLOCK)
    elif part == 1:
        _turn(k_ptr, k_weight_ptr, cos_ptr, sin_ptr, k_out_ptr, at, to, angle, mask, EPS, K_WEIGHT, D, HB, BT, BLOCK)
    elif v_ptr is not None:
        _copy(v_ptr, v_out_ptr, at, to, mask, D, HB)


def why_not(width: int) -> str | None:
    """Why the kernel does not take heads of this width; None = it does."""
    return None if width <= WIDEST_HEAD else f"heads of {width} entries; the kernel holds {WIDEST_HEAD} in registers"


def rms_norm_rotary_(
    out: tuple[Tensor, Tensor, Tensor | None], heads: tuple[Tensor, Tensor, Tensor | None], weights: tuple[Tensor | None, Tensor | None],
    cos: Tensor, sin: Tensor, at: int, eps: float,
) -> None:  # fmt: skip
    """As `op.rms_norm_rotary_`, of checked arguments."""
    q, k, v = _alike(*heads)
    if q.numel() == 0:
        return
    tensors = (q, k, v, *plain_floats(*weights, cos.float(), sin.float()), *out)
    key = (q.get_device(), q.shape, q.stride(), out[0].shape[1], at, tensors_of(tensors), eps)
    call = _ready.get(key)
    if call is None:
        call = _ready.keep(key, _call(tensors, q, out[0].shape[1], at, eps))
    call(*tensors)


def _call(tensors: tuple[Tensor | None, ...], q: Tensor, total: int, at: int, eps: float) -> Call:
    (samples, tokens, count, width), block = q.shape, triton.next_power_of_2(q.shape[3])
    _, _, v, q_weight, k_weight, *_ = tensors
    at_once, rows = max(n for n in range(1, _MOST_HEADS + 1) if count % n == 0), max(1, _ENTRIES // block)
    constants = (count, width, q_weight is not None, k_weight is not None, at_once, rows, block, overlaps(q.device))
    strides = q.stride()[:2]
    return Call(
        rms_norm_rotary_kernel, (cdiv(tokens, rows), count // at_once * (2 if v is None else 3), samples),
        ("rms norm rotary", q.device.index, variant(*tensors, *strides), constants), (tokens, total, at, *strides, eps, *constants),
        {"num_warps": 4, "launch_pdl": constants[-1]},
    )  # fmt: skip


def _alike(q: Tensor, k: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Heads that lie side by side in rows of one stride, as column slices of one product do; copies of those that do not."""
    given = [x for x in (q, k, v) if x is not None]
    if all(x.dtype != torch.float64 and x.stride() == q.stride() and x.stride()[2:] == (x.shape[3], 1) for x in given):
        return q, k, v
    q, k, v = plain_floats(q, k, v)
    return q, k, v
