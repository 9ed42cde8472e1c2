"""Quantization on CUDA GPUs: one pass over memory, scales and step read on the device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.triton import pick, to_codes
from qdm_kernels.gemm.tiles import cdiv
from qdm_kernels.gemm.triton import Call, Ready, follow, kinds, overlaps, scalar_on, variant
from qdm_kernels.quantize.reference import SMALLEST_ROW

_BLOCK = 4096
_LONGEST_BLOCK = 8192  # entries of a row held in registers at a time
_ready: Ready[Call] = Ready(4096)


# COUNT is specialised: masked accesses take 16 bytes at once only where it is known to be a multiple of 16.
@triton.jit(do_not_specialize_on_alignment=["scale_ptr", "zero_ptr", "step_ptr"])
def quantize_kernel(
    x_ptr, scale_ptr, zero_ptr, step_ptr, out_ptr, COUNT,
    TABLES: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    """Entries in memory order -> codes of one scale. TABLES: which of scale 1, zero point 2 are indexed by the step."""
    if OVERLAP:
        follow()
    block = tl.program_id(0)
    at = (block.to(tl.int64) if WIDE else block) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < COUNT, other=0.0).to(tl.float32)  # under way while the step and its row are read
    inverse = tl.div_rn(1.0, pick(scale_ptr, step_ptr, TABLES & 1))
    zero = pick(zero_ptr, step_ptr, TABLES & 2)
    tl.store(out_ptr + at, to_codes(x, inverse, zero, LOW, HIGH), mask=at < COUNT)


@triton.jit
def per_token_kernel(
    x_ptr, scale_ptr, out_ptr, K, SMALLEST: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One row [K] -> its scale max|x| / HIGH and its codes. The second reading of a row comes from the cache."""
    if OVERLAP:
        follow()
    row = tl.program_id(0).to(tl.int64) * K
    top = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(x_ptr + row + at, mask=at < K, other=0.0).to(tl.float32))
        top = tl.maximum(top, x, propagate_nan=tl.PropagateNan.ALL)
    lost = tl.max((top != top).to(tl.int32)) != 0
    largest = tl.where(lost, float("nan"), tl.max(top))
    scale = tl.where(largest <= SMALLEST, 1.0, tl.div_rn(largest, HIGH * 1.0))
    tl.store(scale_ptr + tl.program_id(0), scale)
    inverse = tl.div_rn(1.0, scale)
    for start in range(0, K, BLOCK):
        at = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + row + at, mask=at < K, other=0.0).to(tl.float32)
        tl.store(out_ptr + row + at, to_codes(x, inverse, tl.full((), 0, tl.int32), LOW, HIGH), mask=at < K)


def takes(scale: Tensor, zero_point: Tensor, step: Tensor | None) -> bool:
    """Does the kernel read these: one scale and zero point, or tables with their step."""
    return step is not None or (scale.numel() == 1 and zero_point.numel() == 1)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, bits: int, step: Tensor | None) -> Tensor:
    """As `op.quantize` for what `takes` accepts; memory format kept."""
    x = x.float() if x.dtype == torch.float64 else x
    if not (x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)):
        x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.int8)
    count = x.numel()
    if count == 0:
        return out
    scale, zero_point = scalar_on(scale if scale.dtype == torch.float32 else scale.float(), x.device), scalar_on(zero_point, x.device)
    tensors = (x, scale, zero_point, step, out)
    table = 0 if step is None else (scale.numel() > 1) + 2 * (zero_point.numel() > 1)
    key = ("quantize", x.get_device(), count, x.data_ptr() % 16 == 0, kinds(*tensors), table, bits)
    call = _ready.get(key)
    if call is None:
        call = _ready.keep(key, _quantize_call(x, tensors, table, bits))
    call(*tensors)
    return out


def _quantize_call(x: Tensor, tensors: tuple[Tensor | None, ...], tables: int, bits: int) -> Call:
    count = x.numel()
    constants = (tables, -(1 << bits - 1), (1 << bits - 1) - 1, count >= 1 << 31, _BLOCK, overlaps(x.device))
    return Call(
        quantize_kernel, (cdiv(count, _BLOCK), 1, 1), ("quantize", x.device.index, variant(x, count), kinds(*tensors), constants),
        (count, *constants), {"num_warps": 8, "launch_pdl": constants[-1]},
    )  # fmt: skip


def quantize_per_token(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """As `op.quantize_per_token`."""
    x = (x.float() if x.dtype == torch.float64 else x).contiguous()
    out, scale = torch.empty_like(x, dtype=torch.int8), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel():
        key = ("per token", x.get_device(), x.shape, x.dtype, x.data_ptr() % 16 == 0, bits)
        call = _ready.get(key)
        if call is None:
            call = _ready.keep(key, _per_token_call(x, bits))
        call(x, scale, out)
    return out, scale


def _per_token_call(x: Tensor, bits: int) -> Call:
    k = x.shape[-1]
    block = min(triton.next_power_of_2(k), _LONGEST_BLOCK)
    constants = (SMALLEST_ROW, -(1 << bits - 1), (1 << bits - 1) - 1, block, overlaps(x.device))
    return Call(
        per_token_kernel, (x.numel() // k, 1, 1), ("per token", x.device.index, variant(x, k), constants), (k, *constants),
        {"num_warps": 4 if block <= 2048 else 8, "launch_pdl": constants[-1]},
    )  # fmt: skip
