"""Uniform affine quantization as pure functions (quantization spec 1.1 and 1.2).

Codes are signed: unsigned codes of the papers shifted by 2^(b-1), which leaves every product of centred values unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

SMALLEST_SCALE = 1e-8
MSE_CANDIDATES = 80
MSE_POWER = 2.4
MSE_BLOCK = 1 << 18
"""Values that one block of the search holds: 1 MiB of f32."""
RangeMethod = Literal["max", "mse", "percentile"]


@dataclass(frozen=True)
class IntGrid:
    """Integers that a code can take; `signed=False` counts from 0 (post-softmax maps)."""

    bits: int
    signed: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be between 2 and 8 (got {self.bits})")

    @property
    def lo(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def hi(self) -> int:
        return self.lo + 2**self.bits - 1


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""


@dataclass(frozen=True)
class PerChannel:
    """One scale per index of `axis`."""

    axis: int = 0


@dataclass(frozen=True)
class PerGroup:
    """One scale per output channel (axis 0) and block of `size` consecutive inputs (axis 1)."""

    size: int


@dataclass(frozen=True)
class PerRange:
    """One scale per output channel (axis 0) for the first `split` inputs (axis 1) and one for the rest: concatenated inputs."""

    split: int


Granularity = PerTensor | PerChannel | PerGroup | PerRange


@dataclass(frozen=True)
class QParams:
    """Scale (f32) and zero point (integer-valued f32); shapes [], [C], [O, G] or [O, 2] by granularity. x ~ (q - zero_point) * scale."""

    scale: torch.Tensor
    zero_point: torch.Tensor


def rows_of(x: torch.Tensor, granularity: Granularity) -> torch.Tensor:
    """View of x as [rows, values], one row per scale.

    Raises:
        ValueError: the group size does not divide the inputs.
    """
    if isinstance(granularity, PerTensor):
        return x.reshape(1, -1)
    if isinstance(granularity, PerRange):
        raise ValueError("the two ranges of a split weight have different lengths; take them one at a time")
    if isinstance(granularity, PerChannel):
        return x.movedim(granularity.axis, 0).reshape(x.shape[granularity.axis], -1)
    if x.shape[1] % granularity.size:
        raise ValueError(f"group size {granularity.size} does not divide {x.shape[1]} inputs")
    return x.reshape(x.shape[0] * (x.shape[1] // granularity.size), -1)


def param_shape(shape: torch.Size | tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of the scale of a tensor of `shape`."""
    if isinstance(granularity, PerTensor):
        return ()
    if isinstance(granularity, PerChannel):
        return (shape[granularity.axis],)
    if isinstance(granularity, PerRange):
        return (shape[0], 2)
    return (shape[0], shape[1] // granularity.size)


def broadcast(param: torch.Tensor, shape: torch.Size | tuple[int, ...], granularity: Granularity) -> torch.Tensor:
    """Scale or zero point, shaped so that it broadcasts against a tensor of `shape`."""
    if isinstance(granularity, PerTensor):
        return param.reshape([1] * len(shape))
    if isinstance(granularity, PerChannel):
        view = [1] * len(shape)
        view[granularity.axis] = -1
        return param.reshape(view)
    if isinstance(granularity, PerRange):
        lengths = torch.tensor([granularity.split, shape[1] - granularity.split], device=param.device)
        return param.repeat_interleave(lengths, dim=1).reshape(*shape[:2], *([1] * (len(shape) - 2)))
    return param.repeat_interleave(granularity.size, dim=1).reshape(*shape[:2], *([1] * (len(shape) - 2)))


def qparams_from_range(low: torch.Tensor, high: torch.Tensor, grid: IntGrid, *, symmetric: bool) -> QParams:
    """Scale and zero point of ranges [low, high], both ends first extended to hold 0, so that real 0 is exactly a code."""
    low, high = low.float().clamp_max(0), high.float().clamp_min(0)
    if symmetric:
        scale = (torch.maximum(-low, high) / (grid.hi if grid.signed else 2 ** (grid.bits - 1) - 1)).clamp_min(SMALLEST_SCALE)
        return QParams(scale, torch.zeros_like(scale))
    scale = ((high - low) / (grid.hi - grid.lo)).clamp_min(SMALLEST_SCALE)
    return QParams(scale, torch.round(grid.lo - low / scale).clamp(grid.lo, grid.hi))


def choose_qparams(
    x: torch.Tensor,
    grid: IntGrid,
    granularity: Granularity = PerTensor(),
    *,
    symmetric: bool = False,
    method: RangeMethod = "max",
    percentile: float = 99.99,
) -> QParams:
    """Scale and zero point of a tensor.

    Args:
        x: any shape, finite.
        method: `max` = smallest and largest value; `mse` = the best of 80 shrunk ranges by mean |x - x_hat|^2.4;
            `percentile` = two-sided quantile.
        percentile: share inside the range, in percent; read by `percentile` alone.

    Raises:
        ValueError: x is empty or holds NaN or infinity.
    """
    if isinstance(granularity, PerRange):
        halves = [
            choose_qparams(half, grid, PerChannel(0), symmetric=symmetric, method=method, percentile=percentile)
            for half in x.split([granularity.split, x.shape[1] - granularity.split], dim=1)
        ]
        return QParams(torch.stack([h.scale for h in halves], 1), torch.stack([h.zero_point for h in halves], 1))
    if x.numel() == 0 or not bool(torch.isfinite(x).all()):
        raise ValueError("cannot choose a range: the tensor is empty or holds NaN or infinity")
    rows = rows_of(x.detach().float(), granularity)
    if method == "percentile":
        low, high = _percentile_range(rows, percentile)
    else:
        low, high = rows.amin(1), rows.amax(1)
    params = qparams_from_range(low, high, grid, symmetric=symmetric)
    if method == "mse":
        params = _mse_search(rows, low.clamp_max(0), high.clamp_min(0), grid, symmetric)
    shape = param_shape(x.shape, granularity)
    return QParams(params.scale.reshape(shape), params.zero_point.reshape(shape))


def _percentile_range(rows: torch.Tensor, percentile: float) -> tuple[torch.Tensor, torch.Tensor]:
    tail = (100.0 - percentile) / 200.0
    ordered = rows.sort(dim=1).values
    last = rows.shape[1] - 1
    return ordered[:, round(tail * last)], ordered[:, round((1 - tail) * last)]


def _mse_search(rows: torch.Tensor, low: torch.Tensor, high: torch.Tensor, grid: IntGrid, symmetric: bool) -> QParams:
    """The best of 80 shrunk ranges of each row; rows and candidates are taken in blocks that fit a cache."""
    shrinks = 1 - 0.01 * torch.arange(MSE_CANDIDATES, dtype=torch.float32, device=rows.device)
    block = max(1, MSE_BLOCK // rows.shape[1])
    best = []
    for first in range(0, len(rows), block):
        part = slice(first, first + block)
        params = qparams_from_range(low[part, None] * shrinks, high[part, None] * shrinks, grid, symmetric=symmetric)
        count = max(1, block // len(rows[part]))
        errors = [
            _power_error(rows[part], params.scale[:, start : start + count], params.zero_point[:, start : start + count], grid)
            for start in range(0, MSE_CANDIDATES, count)
        ]
        pick = torch.cat(errors, 1).argmin(1, keepdim=True)
        best.append((params.scale.gather(1, pick)[:, 0], params.zero_point.gather(1, pick)[:, 0]))
    return QParams(torch.cat([scale for scale, _ in best]), torch.cat([zero for _, zero in best]))


def _power_error(rows: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: IntGrid) -> torch.Tensor:
    """Mean |x - x_hat|^2.4 of [R, n] values under [R, C] candidates: [R, C]."""
    scale, zero_point = scale[:, :, None], zero_point[:, :, None]
    error = rows[:, None] * scale.reciprocal()
    error.clamp_(grid.lo - zero_point, grid.hi - zero_point).round_().mul_(scale).sub_(rows[:, None])
    # exp(2.4 log e) takes a fifth of the time of pow; log 0 = -inf gives 0 again
    return error.abs_().log_().mul_(MSE_POWER).exp_().mean(2)


def centred_codes(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, grid: IntGrid) -> torch.Tensor:
    """q - zero_point as integer-valued floats; scale and zero point already broadcast against x.

    Order of operations of the kernels: multiply by the fp32 reciprocal, clamp, round half to even.
    """
    return torch.round(torch.clamp(x * scale.reciprocal(), grid.lo - zero_point, grid.hi - zero_point))


def quantize(x: torch.Tensor, params: QParams, grid: IntGrid, granularity: Granularity = PerTensor()) -> torch.Tensor:
    """Integer codes of x: int8, x's shape."""
    scale, zero = (broadcast(p, x.shape, granularity) for p in (params.scale, params.zero_point))
    return (centred_codes(x.float(), scale, zero, grid) + zero).to(torch.int8)


def dequantize(codes: torch.Tensor, params: QParams, granularity: Granularity = PerTensor()) -> torch.Tensor:
    """(codes - zero_point) * scale in f32."""
    scale, zero = (broadcast(p, codes.shape, granularity) for p in (params.scale, params.zero_point))
    return (codes.float() - zero.float()) * scale


class CentredQuantize(torch.autograd.Function):
    """`centred_codes` with straight-through rounding.

    Gradients of x_hat = scale * centred by (x, scale, zero point): inside the range (1, round(x/s) - x/s, 0); clipped to
    code c (0, c - z, -s). The factor `scale` is applied by the caller, so here they read (1/s, -x/s^2, 0) and (0, 0, -1).
    """

    @staticmethod
    def forward(ctx, x, scale, zero_point, lo: int, hi: int):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x, scale, zero_point)
        ctx.bounds = (lo, hi)
        scaled = x * scale.reciprocal()
        return scaled.clamp_(lo - zero_point, hi - zero_point).round_()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, scale, zero_point = ctx.saved_tensors
        lo, hi = ctx.bounds
        inverse = scale.reciprocal()
        scaled = x * inverse
        inside = (scaled >= lo - zero_point) & (scaled <= hi - zero_point)
        needs_x, needs_scale, needs_zero = ctx.needs_input_grad[:3]
        kept = grad * inside
        grad_x = kept * inverse if needs_x else None
        grad_scale = (kept * scaled).sum_to_size(scale.shape).neg() * inverse if needs_scale else None
        grad_zero = (kept - grad).sum_to_size(zero_point.shape) if needs_zero else None
        return grad_x, grad_scale, grad_zero, None, None


def round_straight_through(x: torch.Tensor) -> torch.Tensor:
    """Round half to even with gradient 1."""
    return x + (torch.round(x) - x).detach()


def fake_quantize(x: torch.Tensor, params: QParams, grid: IntGrid, granularity: Granularity = PerTensor()) -> torch.Tensor:
    """dequantize(quantize(x)) with straight-through gradients by x, scale and zero point (quantization spec 1.1)."""
    scale, zero = (broadcast(p, x.shape, granularity) for p in (params.scale, params.zero_point))
    return CentredQuantize.apply(x, scale, zero, grid.lo, grid.hi) * scale
