"""GELU and GEGLU to codes on CUDA GPUs: one reading, one writing of bytes."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.triton import activate, gain_of, store_rows
from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, overlaps, tensors_of, variant
from qdm_kernels.producer import plain_floats, tables_of
from qdm_kernels.quantize.reference import SMALLEST_ROW

LONGEST_ROW = 16384  # entries held in registers, for a scale per row
_ready: Ready[Call] = Ready(4096)


@triton.jit
def gelu_kernel(
    x_ptr, gain_ptr, scale_ptr, zero_ptr, step_ptr, row_scale_ptr, out_ptr, ROWS, K,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, HAS_GAIN: tl.constexpr, GAIN_TABLE: tl.constexpr, TABLES: tl.constexpr,
    DYNAMIC: tl.constexpr, SMALLEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """R rows, BLOCK columns: x [ROWS, K], or with GATED [ROWS, 2 K] as value and gate -> codes [ROWS, K]."""
    if OVERLAP:
        follow()
    rows, k = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row_ok, k_ok = rows < ROWS, k < K
    mask = row_ok[:, None] & k_ok[None, :]
    if GATED:
        value = x_ptr + rows[:, None] * (2 * K) + k[None, :]
        gate = tl.load(value + K, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(value, mask=mask, other=0.0).to(tl.float32) * activate(gate, ACTIVATION)
    else:
        y = activate(tl.load(x_ptr + rows[:, None] * K + k[None, :], mask=mask, other=0.0).to(tl.float32), ACTIVATION)
    if HAS_GAIN:
        y *= gain_of(gain_ptr, step_ptr, k, k_ok, K, GAIN_TABLE)[None, :]
    store_rows(
        y, out_ptr, row_scale_ptr, scale_ptr, zero_ptr, step_ptr, rows, row_ok, rows[:, None] * K + k[None, :], mask, TABLES, DYNAMIC,
        SMALLEST, LOW, HIGH,
    )  # fmt: skip


def why_not(k: int, per_token: bool) -> str | None:
    """Why the kernel does not take rows of k outputs; None = it does."""
    if not per_token or k <= LONGEST_ROW:
        return None
    return f"rows of {k} entries; a scale per row takes them in registers, {LONGEST_ROW} at most"


def activate_quantize(
    x: Tensor, gated: bool, approximate: str, gain: Tensor | None, scale: Tensor | None, zero_point: Tensor | None, step: Tensor | None,
    bits: int,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Codes int8 [..., K]; scale None = per row, then also float32 [..., 1]."""
    x, gain, scale = plain_floats(x, gain, scale)
    k, lead, dynamic = x.shape[-1] // (2 if gated else 1), x.shape[:-1], scale is None
    out = torch.empty((*lead, k), dtype=torch.int8, device=x.device)
    row_scale = torch.empty((*lead, 1), dtype=torch.float32, device=x.device) if dynamic else None
    if out.numel() == 0:
        return out, row_scale
    tensors = (x, gain, scale, zero_point, step, row_scale, out)
    gain_table, tables = gain is not None and gain.dim() == 2, tables_of(scale, zero_point, step)
    key = (x.get_device(), x.shape, tensors_of(tensors), gated, approximate, gain_table, tables, bits)
    call = _ready.get(key)
    if call is None:
        call = _ready.keep(key, _call(tensors, gated, approximate, gain_table, tables, bits))
    call(*tensors)
    return out, row_scale


def _call(tensors: tuple[Tensor | None, ...], gated: bool, approximate: str, gain_table: bool, tables: int, bits: int) -> Call:
    x, gain, scale, *_, out = tensors
    assert x is not None
    assert out is not None
    k, dynamic = out.shape[-1], scale is None
    rows, block = out.numel() // k, triton.next_power_of_2(k)
    block = block if dynamic else min(block, 1024)
    at_once = max(1, 2048 // block)
    constants = (
        gated, "gelu" if approximate == "none" else "gelu_tanh", gain is not None, gain_table, tables, dynamic, SMALLEST_ROW,
        -(1 << bits - 1), (1 << bits - 1) - 1, at_once, block, overlaps(x.device),
    )  # fmt: skip
    return Call(
        gelu_kernel, (cdiv(rows, at_once), cdiv(k, block), 1), ("gelu", x.device.index, variant(*tensors, rows, k), constants),
        (rows, k, *constants), {"num_warps": max(4, min(16, at_once * block // 512)), "launch_pdl": constants[-1]},
    )  # fmt: skip
