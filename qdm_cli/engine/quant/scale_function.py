"""y = s_out * ((x * s_in) (W_q - z)) + bias with codes that stay packed: forward and own backward (TuneQDM; quantization spec 4.2).

A materialised weight costs autograd one float weight per layer; here only x is kept, and u = (x * s_in) (W_q - z) is computed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv2d_input

from qdm_cli.engine.quant.grid import PerChannel, PerGroup, broadcast
from qdm_cli.engine.quant.modules import conv2d_channels_last
from qdm_kernels.layout import pack_weight, padded_length, unpack_weight


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """int8 [O, K] or [O, I, kh, kw] -> [O, ceil64(K) / 2] uint8 up to 4 bits, else [O, K] int8. Meta tensors stay meta."""
    rows = codes if codes.ndim == 2 else codes.permute(0, 2, 3, 1).flatten(1)
    if rows.is_meta:  # whose values cannot be checked
        return rows if bits > 4 else rows.new_empty(len(rows), padded_length(rows.shape[1]) // 2, dtype=torch.uint8)
    return pack_weight(rows.contiguous(), bits)


def unpack_codes(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """Inverse of `pack_codes`: int8 of `shape`, contiguous."""
    outputs, inputs, *kernel = shape
    rows = unpack_weight(packed, bits, (outputs, inputs * prod(kernel)))
    return rows.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).contiguous() if kernel else rows


def along_channels(scale: Tensor, x: Tensor, *, conv: bool) -> Tensor:
    """A scale [C], or [B, C] with one row per sample, shaped to broadcast against the channels of x [B, C, H, W] or [..., C].

    Raises:
        ValueError: the batch of x is no multiple of B.
    """
    tail = [1] * (2 if conv else 0)
    if scale.ndim == 1:
        return scale.reshape(-1, *tail)
    repeats, rest = divmod(x.shape[0], scale.shape[0])
    if rest:
        raise ValueError(f"{scale.shape[0]} timesteps for a batch of {x.shape[0]}")
    scale = scale.repeat_interleave(repeats, 0) if repeats > 1 else scale
    return scale.reshape(scale.shape[0], *([1] * (x.ndim - 2 - len(tail))), scale.shape[1], *tail)


BLOCK = 2**20
"""Values of a product that is only summed."""


@dataclass(frozen=True)
class CodedOperand:
    """An integer weight as the operand of a linear layer or a convolution.

    Attributes:
        packed: codes as an export stores them: rows of K = kh * kw * I, taps outermost, two to a byte up to 4 bits (`pack_codes`).
        zero_point: int8 [O], or [O, G] beside `group_scale`.
        bits: of a code.
        shape: of the weight, [O, K] or [O, I / groups, kh, kw].
        group_scale: f32 [O, G] fixed scales of groups of inputs; None = one scale per output, which is `s_out`.
        conv: stride, padding, dilation and groups of a convolution; None = linear.
    """

    packed: Tensor
    zero_point: Tensor
    bits: int
    shape: tuple[int, ...]
    group_scale: Tensor | None = None
    conv: tuple[Any, Any, Any, int] | None = None

    def centred(self, dtype: torch.dtype) -> Tensor:
        """W_q - z in the weight's shape, times the group scales where there are any; made anew at every call."""
        codes = unpack_codes(self.packed, self.bits, self.shape)
        group = self.group_scale
        granularity = PerChannel(0) if group is None else PerGroup(self.shape[1] // group.shape[1])
        weight = codes.to(dtype).sub_(broadcast(self.zero_point.to(dtype), self.shape, granularity))
        return weight if group is None else weight.mul_(broadcast(group.to(dtype), self.shape, granularity))

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer's product without scales or bias."""
        return F.linear(x, weight) if self.conv is None else conv2d_channels_last(x, weight, None, *self.conv)

    def apply_transposed(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of `apply` by its input, which had `shape`."""
        return grad @ weight if self.conv is None else conv2d_input(list(shape), weight, grad, *self.conv)

    def along(self, scale: Tensor, x: Tensor) -> Tensor:
        """`along_channels` of this layer."""
        return along_channels(scale, x, conv=self.conv is not None)

    def reduced(self, product: Tensor, scale: Tensor) -> Tensor:
        """Sum over everything that one entry of `scale` was broadcast to: inverse of `along`."""
        channel = product.ndim - 1 if self.conv is None else 1
        if scale.ndim == 1:
            return product.sum([axis for axis in range(product.ndim) if axis != channel])
        per_sample = product.flatten(1) if product.ndim == 2 else product.sum([a for a in range(1, product.ndim) if a != channel])
        return per_sample.reshape(scale.shape[0], -1, scale.shape[1]).sum(1)

    def reduced_product(self, a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
        """`reduced` of a * b, some channels at a time, so that a large product is never held whole."""
        axis = a.ndim - 1 if self.conv is None else 1
        some = max(1, BLOCK * a.shape[axis] // a.numel())
        sums = [
            self.reduced(part * other, row)
            for part, other, row in zip(a.split(some, axis), b.split(some, axis), scale.split(some, -1), strict=True)
        ]
        return torch.cat(sums, -1)


class ScaledProduct(torch.autograd.Function):
    """`scaled_product` with saved tensors x, s_out and s_in alone; x only where a scale trains.

    With g = dL/dy and v = (g * s_out) (W_q - z): ds_out = sum g * u, ds_in = sum x * v, dx = v * s_in.
    """

    @staticmethod
    def forward(ctx, x, s_out, s_in, bias, operand: CodedOperand):  # type: ignore[no-untyped-def]
        scales_train = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(x if scales_train else None, s_out, s_in)
        ctx.operand, ctx.like = operand, (x.shape, x.dtype)
        weight = operand.centred(x.dtype)
        y = operand.apply(_scaled(x, s_in, operand), weight)
        y.mul_(operand.along(s_out.to(x.dtype), y))
        return y if bias is None else y.add_(operand.along(bias.to(x.dtype), y))

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        x, s_out, s_in = ctx.saved_tensors
        operand: CodedOperand = ctx.operand
        needs_x, needs_out, needs_in = ctx.needs_input_grad[:3]
        shape, dtype = ctx.like
        weight = operand.centred(dtype)
        grad_x = grad_in = None
        grad_out = _grad_out(x, s_out, s_in, grad, weight, operand) if needs_out else None
        if needs_x or needs_in:
            v = operand.apply_transposed(*_scale_rows_(grad, s_out.to(dtype), weight, operand), shape)
            if needs_in:
                grad_in = operand.reduced_product(x, v, s_in).to(s_in.dtype)
            if needs_x:
                grad_x = v if s_in is None else v.mul_(operand.along(s_in.to(dtype), v))
        return grad_x, grad_out, grad_in, None, None


def _grad_out(x: Tensor, s_out: Tensor, s_in: Tensor | None, grad: Tensor, weight: Tensor, operand: CodedOperand) -> Tensor:
    """sum g * u; u is as large as the output, and gone when this returns."""
    return operand.reduced(operand.apply(_scaled(x, s_in, operand), weight).mul_(grad), s_out).to(s_out.dtype)


def _scale_rows_(grad: Tensor, s_out: Tensor, weight: Tensor, operand: CodedOperand) -> tuple[Tensor, Tensor]:
    """Factors of (g * s_out) (W_q - z): one row of scales goes into the weight, in place, which is smaller than a second gradient."""
    if s_out.numel() == len(weight):
        return grad, weight.mul_(s_out.reshape(-1, *([1] * (weight.ndim - 1))))
    return grad * operand.along(s_out, grad), weight


def _scaled(x: Tensor, s_in: Tensor | None, operand: CodedOperand) -> Tensor:
    return x if s_in is None else x * operand.along(s_in.to(x.dtype), x)


def scaled_product(x: Tensor, s_out: Tensor, s_in: Tensor | None, bias: Tensor | None, operand: CodedOperand) -> Tensor:
    """s_out * ((x * s_in) (W_q - z)) + bias, differentiable by x, s_out and s_in.

    Args:
        x: float [..., K] or [B, I, H, W]; the sums are in its dtype.
        s_out: [O], or [B, O] with a row per sample (mixed timesteps).
        s_in: [K] or [I] (all input channels of a grouped convolution), or [B, .]; None = ones.
        bias: [O], fixed.

    Raises:
        ValueError: B does not divide the batch of x.
    """
    return ScaledProduct.apply(x, s_out, s_in, bias, operand)
