"""What keeps integer arithmetic exact on float hardware: bounds, splits, and the epilogue every backend shares."""

import torch
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.attention.op import has_tiles

FP32_EXACT = 1 << 24  # every integer up to here is a float32
INT32_MAX = (1 << 31) - 1

Slice = tuple[int, int]


def subtract_zero_point(codes: Tensor, zero_point: Tensor) -> Tensor:
    """Weight codes minus their zero point: int8 [N, ...], int [N] -> int16 [N, ...], in [-255, 255]."""
    return codes.to(torch.int16) - zero_point.to(torch.int16).view(-1, *[1] * (codes.dim() - 1))


def value_range(values: Tensor) -> tuple[int, int]:
    """Lowest and highest value of an integer tensor; (0, 0) when empty."""
    if values.numel() == 0:
        return 0, 0
    low, high = values.aminmax()
    return int(low), int(high)


def l1_by_input(weight: Tensor) -> Tensor:
    """Sum of |w| over the taps: [N, K] -> [N, K], [O, I, kh, kw] -> [O, I]; int64."""
    return weight.abs().flatten(2).sum(2) if weight.dim() == 4 else weight.abs().long()


def split_exact(l1: Tensor, x_abs_max: int) -> tuple[Slice, ...]:
    """Fewest equal slices of the inputs whose partial sums all stay below 2^24 for any |x| <= x_abs_max.

    l1: [N, K], sum of |w| per output and input. ValueError when one input alone exceeds it.
    """
    k, limit = l1.shape[1], FP32_EXACT // x_abs_max
    if l1.numel() == 0:
        return ((0, k),)
    if int(l1.max()) > limit:
        raise ValueError(f"one input alone can sum to {int(l1.max()) * x_abs_max}, past 2^24; use backend='reference'")
    count = -(-int(l1.sum(1).max()) // limit) or 1
    while True:
        slices = _equal_slices(k, count)
        if all(int(l1[:, a:b].sum(1).max()) <= limit for a, b in slices):
            return slices
        count += 1


def _equal_slices(k: int, count: int) -> tuple[Slice, ...]:
    size = -(-k // count)
    return tuple((start, min(start + size, k)) for start in range(0, k, size))


def centred_range(codes: Tensor, zero_point: Tensor) -> tuple[int, int]:
    """Lowest and highest of int8 codes [N, ...] minus integer zero points [N]; (0, 0) when empty."""
    if not codes.numel():
        return 0, 0
    low, high = codes.flatten(1).aminmax(dim=1)
    return int((low.to(torch.int32) - zero_point).min()), int((high.to(torch.int32) - zero_point).max())


def check_int32(codes: Tensor, zero_point: Tensor) -> None:
    """ValueError when an int32 accumulator over weight codes [N, ...] minus zero points [N] could overflow for some activation."""
    if 255 * 255 * codes[:1].numel() <= INT32_MAX:
        return
    worst = 255 * int(l1_by_input(subtract_zero_point(codes, zero_point)).sum(1).max()) if codes.numel() else 0
    if worst > INT32_MAX:
        raise ValueError(f"accumulators can reach {worst}, past int32; the layer has too many inputs per output")


def why_not_int8(op: str, codes: Tensor, weight: Tensor) -> tuple[bool, str | None]:
    """Can oneDNN int8 hold a weight: (True, None) as w - z_w, (False, None) as w with z_w corrected by an input sum, or (False, reason)."""
    folded = backend.why_not("onednn", op, weight_range=value_range(weight)) is None
    reason = None if folded else backend.why_not("onednn", op, weight_range=value_range(codes))
    if reason is None and has_tiles() and len(split_exact(l1_by_input(weight if folded else codes.to(torch.int16)), 255)) > 1:
        reason = "sums past 2^24, which oneDNN rounds where AMX multiplies before it takes the zero point off"
    return folded and reason is None, reason


def rescale_(sums: Tensor, x_scale: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """Epilogue of the contract, in place on float32 sums: one multiply by the product of scales, one add."""
    sums.mul_(x_scale * w_scale)
    return sums if bias is None else sums.add_(bias)


def subtract_input_sum(sums: Tensor, zero_point: Tensor, dim: int) -> Tensor | None:
    """Weight zero points applied after the product, w A - z_w X, where the last entry of `dim` is X, the sum of inputs.

    sums: float32, N + 1 along dim; zero_point: float32, broadcastable. Returns float32, N along dim; None when a term passes 2^24,
    so that one rounding could become two.
    """
    n = sums.shape[dim] - 1
    products, inputs = sums.split([n, 1], dim)
    if sums.numel() and (_abs_max(products) > FP32_EXACT or _abs_max(inputs) * _abs_max(zero_point) > FP32_EXACT):
        return None
    return torch.addcmul(products, inputs, zero_point, value=-1)


def _abs_max(values: Tensor) -> float:
    low, high = values.aminmax()
    return max(-float(low), float(high))
