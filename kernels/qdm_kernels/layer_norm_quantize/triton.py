"""LayerNorm to codes on CUDA GPUs: whole rows in registers, read once, written as bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.triton import gain_of, store_rows
from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, overlaps, tensors_of, variant
from qdm_kernels.producer import plain_floats, tables_of
from qdm_kernels.quantize.reference import SMALLEST_ROW

LONGEST_ROW = 16384  # entries held in registers
_ready: Ready[Call] = Ready(4096)


@triton.jit
def layer_norm_kernel(
    x_ptr, weight_ptr, bias_ptr, m_ptr, shift_ptr, gain_ptr, scale_ptr, zero_ptr, step_ptr, row_scale_ptr, out_ptr, ROWS, K,
    ROWS_PER_SAMPLE, EPS,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, MODULATED: tl.constexpr, HAS_GAIN: tl.constexpr, GAIN_TABLE: tl.constexpr,
    TABLES: tl.constexpr, DYNAMIC: tl.constexpr, SMALLEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr,
    R: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """R rows of x [ROWS, K] -> codes. m, shift [samples, K]; gain [K] or [S, K]."""
    if OVERLAP:
        follow()
    rows, k = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.arange(0, BLOCK)
    row_ok, k_ok = rows < ROWS, k < K
    mask = row_ok[:, None] & k_ok[None, :]
    at = rows[:, None] * K + k[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, x - (tl.sum(x, axis=1) / K)[:, None], 0.0)
    y = centred * tl.rsqrt(tl.sum(centred * centred, axis=1) / K + EPS)[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + k, mask=k_ok, other=0.0).to(tl.float32)[None, :]
    if MODULATED:
        sample = (rows // ROWS_PER_SAMPLE)[:, None] * K + k[None, :]
        m = tl.load(m_ptr + sample, mask=mask, other=0.0).to(tl.float32)
        y = y * (1.0 + m) + tl.load(shift_ptr + sample, mask=mask, other=0.0).to(tl.float32)
    if HAS_GAIN:
        y *= gain_of(gain_ptr, step_ptr, k, k_ok, K, GAIN_TABLE)[None, :]
    store_rows(
        y, out_ptr, row_scale_ptr, scale_ptr, zero_ptr, step_ptr, rows, row_ok, at, mask, TABLES, DYNAMIC, SMALLEST, LOW, HIGH
    )  # fmt: skip


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
    rows, block = x.numel() // x.shape[-1], triton.next_power_of_2(x.shape[-1])
    at_once = max(1, 2048 // block)
    constants = (
        weight is not None, bias is not None, m is not None, gain is not None, gain_table, tables, scale is None, SMALLEST_ROW,
        -(1 << bits - 1), (1 << bits - 1) - 1, at_once, block, overlaps(x.device),
    )  # fmt: skip
    sizes = (rows, x.shape[-1], rows // x.shape[0])
    return Call(
        layer_norm_kernel, (cdiv(rows, at_once), 1, 1), ("layer norm", x.device.index, variant(*tensors, *sizes), constants),
        (*sizes, eps, *constants), {"num_warps": max(4, min(16, at_once * block // 512)), "launch_pdl": constants[-1]},
    )  # fmt: skip
