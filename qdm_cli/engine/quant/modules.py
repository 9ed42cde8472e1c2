"""Linear and Conv2d on centred integers held in floats: the training graph, and the simulation that the exported integers must equal.

    y = op(q_x - z_x, q_w - z_w) * (s_x * s_w) + bias                                  (quantization spec 1.3)

Sums of products of small integers are exact in fp32, so this form gives the integer kernels' accumulators bit for bit.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.grid import (
    CentredQuantize,
    Granularity,
    IntGrid,
    PerChannel,
    PerGroup,
    PerRange,
    broadcast,
    qparams_from_range,
    round_straight_through,
)
from qdm_cli.engine.quant.state import LayerDecision, LayerState


def weight_granularity(decision: LayerDecision) -> Granularity:
    """Granularity of the stored weight scale; a per-tensor scale is stored once per channel."""
    if decision.split is not None:
        return PerRange(decision.split)
    return PerGroup(decision.group_size) if decision.granularity == "group" and decision.group_size else PerChannel(0)


class StepScales(nn.Module):
    """Activation scales and zero points as tables [R] over denoising steps (TALSQ, Eq. 9 of EfficientDM); one row = static.

    A layer that quantizes its input in two parts has tables [R, 2].

    Scales are held as logarithms, so that one learning rate suits layers of any range. Zero points are real numbers that
    are rounded, straight through, wherever they are used: otherwise training and kernel differ at the clip ends.
    """

    def __init__(self, scale: torch.Tensor, zero_point: torch.Tensor, grid: IntGrid, *, symmetric: bool):
        super().__init__()
        self.grid = grid
        self.symmetric = symmetric
        self.log_scale = nn.Parameter(scale.detach().float().log(), requires_grad=False)
        self.zero_point = nn.Parameter(zero_point.detach().float().clone(), requires_grad=False)
        self.register_buffer("exact_scale", scale.detach().float().clone(), persistent=False)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and integer zero point, [R] or [R, 2] each. Untouched scales are returned to the bit, not through exp(log)."""
        trained = self.log_scale.requires_grad or self.exact_scale is None
        scale = self.log_scale.exp() if trained else cast(torch.Tensor, self.exact_scale)
        zero = round_straight_through(self.zero_point.clamp(self.grid.lo, self.grid.hi))
        return scale, zero

    def train_(self) -> StepScales:
        """Make the tables trainable; the zero point of a symmetric quantizer stays 0."""
        self.exact_scale = None
        self.log_scale.requires_grad_(True)
        self.zero_point.requires_grad_(not self.symmetric)
        return self


def dynamic_qparams(x: torch.Tensor, grid: IntGrid, *, symmetric: bool, per_token: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of this call: one per token ([..., 1]) or one per sample ([B, 1, 1, 1])."""
    dims = (-1,) if per_token else tuple(range(1, x.ndim))
    params = qparams_from_range(x.detach().amin(dims, keepdim=True), x.detach().amax(dims, keepdim=True), grid, symmetric=symmetric)
    return params.scale, params.zero_point


class CodedWeight(nn.Module):
    """A weight that is integer codes already: what calibration leaves and export packs."""

    def __init__(self, state: LayerState):
        super().__init__()
        granularity = weight_granularity(state.decision)
        zero = broadcast(state.weight_zero_point.float(), state.codes.shape, granularity)
        self.register_buffer("centred", state.codes.float() - zero)
        self.register_buffer("scale", state.weight_scale.float())

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(centred codes as floats, scale [O] or [O, G])."""
        return cast(torch.Tensor, self.centred), cast(torch.Tensor, self.scale)


class QuantizedLayer(nn.Module):
    """Shared part of QLinear and QConv2d.

    Args:
        decision: the bit policy of this layer.
        weight: module that returns (centred codes as floats, scale).
        bias: [O] or None.
        scales: activation tables; None = dynamic or float activations by `decision`.
        step: which denoising step it is.
        pre_scale: f32 [I], factor of each input channel; `weight` then stands for W / pre_scale. None = 1.
    """

    channel_dim: int
    pre_scale: torch.Tensor | None

    def __init__(
        self,
        decision: LayerDecision,
        weight: nn.Module,
        bias: torch.Tensor | None,
        scales: StepScales | None,
        step: StepContext,
        pre_scale: torch.Tensor | None = None,
    ):
        super().__init__()
        self.decision = decision
        self.weight_source = weight
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        self.scales = scales
        self.step = step
        self.register_buffer("pre_scale", None if pre_scale is None else pre_scale.detach().float())

    def scaled_input(self, x: torch.Tensor) -> torch.Tensor:
        """x as f32 with every input channel times its factor."""
        return x.float() if self.pre_scale is None else x.float() * self.channel_shape(self.pre_scale)

    def centred_input(self, x: torch.Tensor, part: int | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(q - z as floats, scale that broadcasts against x); float activations pass through with scale None.

        `part`: column of the tables of a split input; None = not split.
        """
        if self.decision.bits_a is None:
            return x, None
        grid = IntGrid(self.decision.bits_a)
        if self.scales is None:
            per_token = self.decision.type == "Linear"
            scale, zero = dynamic_qparams(x, grid, symmetric=self.decision.act_symmetric, per_token=per_token)
        else:
            tables = self.scales.tables() if part is None else (table[:, part] for table in self.scales.tables())
            scale, zero = (_as_rows(self.step.pick(table), x.ndim) for table in tables)
            zero = round_straight_through(zero)
        return CentredQuantize.apply(x, scale, zero, grid.lo, grid.hi), scale

    def combine(self, x: torch.Tensor) -> torch.Tensor:
        """The layer in fp32; the caller restores the dtype."""
        x = self.scaled_input(x)
        if self.decision.split is not None:
            return self.combine_parts(x)
        centred, x_scale = self.centred_input(x)
        weight, w_scale = self.weight_source()
        if w_scale.ndim == 2:
            weight = weight * broadcast(w_scale, weight.shape, PerGroup(weight.shape[1] // w_scale.shape[1]))
            scale = torch.ones_like(w_scale[:, 0])
        else:
            scale = w_scale
        channels = self.channel_shape(scale)
        y = self.apply_op(centred, weight) * (channels if x_scale is None else x_scale * channels)
        return y if self.bias is None else y + self.channel_shape(self.bias)

    def combine_parts(self, x: torch.Tensor) -> torch.Tensor:
        """Two concatenated inputs, each with ranges of its own: y1 + (y2 + bias) (Q-Diffusion, Eq. 8)."""
        weight, w_scale = self.weight_source()
        sizes = list(self.decision.input_halves)
        halves = zip(x.split(sizes, dim=self.channel_dim), weight.split(sizes, dim=1), strict=True)
        sums = []
        for part, (x_part, w_part) in enumerate(halves):
            centred, x_scale = self.centred_input(x_part, part)
            channels = self.channel_shape(w_scale[:, part])
            sums.append(self.apply_op(centred, w_part) * (channels if x_scale is None else x_scale * channels))
        first, second = sums
        return first + (second if self.bias is None else second + self.channel_shape(self.bias))

    def forward(self, x: torch.Tensor, *unused: object) -> torch.Tensor:
        """`unused`: diffusers passes a LoRA scale to some layers."""
        # autocast would round the integer products to bf16, whose 8 bits of mantissa do not hold them
        with torch.autocast(x.device.type, enabled=False):
            return self.combine(x).to(x.dtype)

    def apply_op(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def channel_shape(self, per_channel: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


def _as_rows(value: torch.Tensor, ndim: int) -> torch.Tensor:
    return value if value.ndim == 0 else value.reshape(-1, *([1] * (ndim - 1)))


class QLinear(QuantizedLayer):
    """x: [..., K] float -> [..., O]."""

    channel_dim = -1

    def apply_op(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    def channel_shape(self, per_channel: torch.Tensor) -> torch.Tensor:
        return per_channel


class QConv2d(QuantizedLayer):
    """x: [B, I, H, W] float -> [B, O, H', W']; a padded pixel is real 0."""

    channel_dim = 1

    def __init__(
        self,
        decision: LayerDecision,
        weight: nn.Module,
        bias: torch.Tensor | None,
        scales: StepScales | None,
        step: StepContext,
        conv: nn.Conv2d,
        pre_scale: torch.Tensor | None = None,
    ):
        super().__init__(decision, weight, bias, scales, step, pre_scale)
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, conv.groups

    def apply_op(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return conv2d_channels_last(x, weight, None, self.stride, self.padding, self.dilation, self.groups)

    def channel_shape(self, per_channel: torch.Tensor) -> torch.Tensor:
        return per_channel.reshape(-1, 1, 1)


def conv2d_channels_last(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
) -> torch.Tensor:
    """F.conv2d whose output is channels_last, as the integer kernels' is: norms round differently over another memory format, and one
    ulp can turn a later code."""
    y = F.conv2d(x.contiguous(memory_format=torch.channels_last), weight, bias, stride, padding, dilation, groups)
    return y.contiguous(memory_format=torch.channels_last)


def build_layer(
    original: nn.Module,
    decision: LayerDecision,
    weight: nn.Module,
    bias: torch.Tensor | None,
    scales: StepScales | None,
    step: StepContext,
    pre_scale: torch.Tensor | None = None,
) -> QuantizedLayer:
    """The quantized layer that takes the place of `original`."""
    if isinstance(original, nn.Conv2d):
        return QConv2d(decision, weight, bias, scales, step, original, pre_scale)
    return QLinear(decision, weight, bias, scales, step, pre_scale)


def per_input(pre_scale: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Factors [I] of the input channels of an ungrouped layer, shaped to multiply its weight [O, I, ...]."""
    return pre_scale.reshape(1, -1, *([1] * (weight.ndim - 2)))


def weight_before_codes(weight: torch.Tensor, pre_scale: torch.Tensor | None) -> torch.Tensor:
    """The float weight that the codes of a layer stand for: W / pre_scale, in f32, on the weight's device."""
    weight = weight.detach().float()
    return weight if pre_scale is None else weight / per_input(pre_scale.to(weight.device), weight)
