"""Convolution in float64 over weights kept in the storage layout of int4 (README: Packing layout), expanded on every call."""

from dataclasses import dataclass

from torch import Tensor

from qdm_kernels.conv2d_w8a8 import reference as wide
from qdm_kernels.geometry import Conv2dGeometry
from qdm_kernels.layout import pack_weight, unpack_weight


@dataclass(frozen=True)
class State:
    """packed: uint8 [O, kh, kw, ceil64(I) / 2]; shape: of the codes, [O, I / groups, kh, kw]; zero_point: int [O]."""

    packed: Tensor
    shape: tuple[int, ...]
    zero_point: Tensor
    geometry: Conv2dGeometry
    strategy: str = "float64"
    reason: str | None = None


def prepare(codes: Tensor, zero_point: Tensor, geometry: Conv2dGeometry) -> State:
    """Pack two codes to a byte; arguments as in `op.prepare`."""
    return State(pack_weight(codes, 4), tuple(codes.shape), zero_point, geometry)


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum (x - z_x)(w - z_w), padding is real 0: x int8 [B, I, H, W] -> int32 [B, O, H', W']."""
    return wide.accumulate(x, zero_point, _expanded(state))


def conv2d(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """float(accumulator) * (x_scale * w_scale) + bias; w_scale, bias: [O, 1, 1]. -> float32 [B, O, H', W']."""
    return wide.conv2d(x, x_scale, zero_point, w_scale, bias, _expanded(state))


def _expanded(state: State) -> wide.State:
    return wide.prepare(unpack_weight(state.packed, 4, state.shape), state.zero_point, state.geometry)
