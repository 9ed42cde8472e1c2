"""2-D convolution on integer codes: y = float(sum (x - z_x)(w - z_w)) * (s_x * s_w) + bias (README: Arithmetic contract)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.conv2d_w8a8 import cpu, reference
from qdm_kernels.exact import check_int32, subtract_zero_point
from qdm_kernels.geometry import Conv2dGeometry, Pair
from qdm_kernels.prepared import Prepared, check_activation, check_weight, integer_op

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


@dataclass(frozen=True)
class PreparedConv2d(Prepared):
    """A weight packed for one backend. strategy: how it computes; reason: why not by oneDNN int8, None = it does or was not asked."""

    backend: str
    in_channels: int
    out_channels: int
    scale: Tensor  # float32 [O, 1, 1]
    bias: Tensor | None  # float32 [O, 1, 1]
    geometry: Conv2dGeometry
    state: Any

    @property
    def strategy(self) -> str:
        """`onednn`, `fp32` or `float64`."""
        return self.state.strategy

    @property
    def reason(self) -> str | None:
        """Why the oneDNN int8 kernel was passed over."""
        return self.state.reason


@integer_op
def prepare(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    backend: str | None = None,
) -> PreparedConv2d:
    """Pack a weight once: codes int8 [O, I / groups, kh, kw], scale float32 [O], zero_point int [O], bias float32 [O] or None.

    4-bit weights come as plain codes (-8..7). padding is the same on both sides. backend: None = `qdm_kernels.backend.choose`.
    ValueError on wrong shapes or dtypes, a backend that cannot run, or a layer whose accumulator could overflow int32.
    """
    check_weight(codes, scale, zero_point, bias, dim=4)
    check_int32(subtract_zero_point(codes, zero_point))
    if codes.shape[0] % groups:
        raise ValueError(f"{codes.shape[0]} filters do not divide into {groups} groups")
    geometry = Conv2dGeometry(stride, padding, dilation, groups)
    name = _backend.choose("conv2d_w8a8", device=codes.device, backend=backend)
    state = _IMPLEMENTATIONS[name].prepare(codes, zero_point, geometry)
    kept_bias = None if bias is None else bias.detach().float().view(-1, 1, 1)
    return PreparedConv2d(name, codes.shape[1] * groups, codes.shape[0], scale.detach().float().view(-1, 1, 1), kept_bias, geometry, state)


@integer_op
def conv2d(x_codes: Tensor, x_scale: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d) -> Tensor:
    """Apply a prepared layer: x_codes int8 [B, I, H, W] -> float32 [B, O, H', W'] channels_last, bit-identical on every backend.

    A padded pixel is real 0, the code x_zero_point. x_scale: float32, one element, or [B, 1, 1, 1] per image; x_zero_point: int, one
    element. ValueError on another dtype or shape.
    """
    x = _channels_last(x_codes, x_zero_point, prepared)
    s = x_scale.float().reshape(()) if x_scale.numel() == 1 else x_scale.float()
    return _IMPLEMENTATIONS[prepared.backend].conv2d(x, s, x_zero_point, prepared.scale, prepared.bias, prepared.state)


@integer_op
def accumulate(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d) -> Tensor:
    """Exact integer part: sum (x - z_x)(w - z_w), x_codes int8 [B, I, H, W] -> int32 [B, O, H', W']. Errors as `conv2d`."""
    x = _channels_last(x_codes, x_zero_point, prepared)
    return _IMPLEMENTATIONS[prepared.backend].accumulate(x, x_zero_point, prepared.state)


def _channels_last(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d) -> Tensor:
    check_activation(x_codes, x_zero_point)
    if x_codes.dim() != 4 or x_codes.shape[1] != prepared.in_channels:
        raise ValueError(f"x_codes is [B, {prepared.in_channels}, H, W], got {tuple(x_codes.shape)}")
    return x_codes.contiguous(memory_format=torch.channels_last)
