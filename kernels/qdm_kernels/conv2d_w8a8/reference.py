"""Convolution in float64: integers below 2^53 are exact, so this is right by inspection."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.exact import subtract_zero_point
from qdm_kernels.geometry import Conv2dGeometry


@dataclass(frozen=True)
class State:
    """weight: codes minus zero point, [O, I / groups, kh, kw] int16."""

    weight: Tensor
    geometry: Conv2dGeometry
    strategy: str = "float64"
    reason: str | None = None


def prepare(codes: Tensor, zero_point: Tensor, geometry: Conv2dGeometry) -> State:
    """Keep w - z_w; arguments as in `op.prepare`."""
    return State(subtract_zero_point(codes, zero_point), geometry)


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum (x - z_x)(w - z_w), padding is real 0: x int8 [B, I, H, W] -> int32 [B, O, H', W']."""
    g, real = state.geometry, x.double() - zero_point.double()
    return F.conv2d(F.pad(real, g.border), state.weight.double(), None, g.stride, 0, g.dilation, g.groups).to(torch.int32)


def conv2d(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """float(accumulator) * (x_scale * w_scale) + bias; w_scale, bias: [O, 1, 1]. -> float32 [B, O, H', W']."""
    y = accumulate(x, zero_point, state).float() * (x_scale * w_scale)
    return y if bias is None else y + bias
