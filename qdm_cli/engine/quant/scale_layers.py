"""A denoiser whose integer weights stay packed and whose scales train: PEQA (s_out per channel), TuneQDM (s_out, s_in per interval)."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.attention import attach_attention_
from qdm_cli.engine.quant.modules import CodedWeight, QuantizedLayer, build_layer
from qdm_cli.engine.quant.scale_function import CodedOperand, pack_codes, scaled_product
from qdm_cli.engine.quant.scale_rows import TABLES, ScaleRows, Widths
from qdm_cli.engine.quant.scale_set import LayerScales, ScaleSet, codes_digest
from qdm_cli.engine.quant.state import LayerState, QuantState
from qdm_cli.engine.quant.state_apply import checked_layer, load_floats_, replace_, scales_of


def start_scales(state: QuantState, denoiser: nn.Module, *, keys: Tensor, input_scales: bool, base: str | None = None) -> ScaleSet:
    """Scales to start from: those of the state, the same in every interval; s_in = 1.

    A state that holds scales already continues from them: each new interval starts as the old one that holds its smallest timestep.

    Args:
        denoiser: float or meta model, for the groups of its convolutions.
        keys: f64 [n], smallest timestep of each interval.
        input_scales: with s_in (TuneQDM) or without (PEQA).
        base: `state_digest(state)`; None = the scales will not be written.
    """
    layers = {}
    for name, layer in scalable(state).items():
        group = layer.decision.granularity == "group"
        out = torch.ones(layer.codes.shape[0]) if group else layer.weight_scale.float()
        begin = LayerScales(out[None], None)
        rows = torch.zeros(len(keys), dtype=torch.long)
        if state.scales is not None and name in state.scales.layers:
            begin = state.scales.layers[name]
            if len(begin.out) > 1:
                rows = torch.searchsorted(state.scales.keys, keys.double(), right=True).sub(1).clamp_min(0)
        in_ = begin.in_
        if in_ is None and input_scales:
            in_ = torch.ones(1, layer.codes.shape[1] * getattr(denoiser.get_submodule(name), "groups", 1))
        layers[name] = LayerScales(begin.out[rows].clone(), None if in_ is None else in_[rows].clone())
    return ScaleSet("" if base is None else base, layers, keys.double())


def state_digest(state: QuantState) -> str:
    """Digest of a state's integer weights."""
    return codes_digest(
        (name, layer.decision.bits_w, pack_codes(layer.codes, layer.decision.bits_w), layer.weight_zero_point)
        for name, layer in scalable(state).items()
    )


def scalable(state: QuantState) -> dict[str, LayerState]:
    """Layers that a scale set covers: all but those on two concatenated inputs, whose halves have scales of their own."""
    return {name: layer for name, layer in state.layers.items() if layer.decision.split is None}


class ScaleTables(ScaleRows):
    """Scales that train: s = s_start * exp(delta).

    A step of the optimizer is a relative change whatever the scale, and an untouched scale is returned to the bit.
    """

    def __init__(self, widths: Widths, keys: Tensor, *, device: str | torch.device = "meta"):
        super().__init__(widths, keys, device=device)
        deep = self._buffers["scale_in"]
        self.delta_out = nn.Parameter(torch.zeros_like(self.scale_out), requires_grad=False)
        self.delta_in = None if deep is None else nn.Parameter(torch.zeros_like(deep), requires_grad=False)

    def tables(self) -> tuple[Tensor, Tensor | None]:
        deep = self._buffers["scale_in"]
        return self.scale_out * self.delta_out.exp(), None if deep is None or self.delta_in is None else deep * self.delta_in.exp()


class ScaledLayer(QuantizedLayer):
    """Linear or Conv2d on packed codes with scales from `ScaleTables`; activations are quantized after s_in where the policy says so.

    Args:
        state: codes, bias and activation tables.
        original: the float layer, for its geometry; its weight is not used.
        tables: shared by all layers of the denoiser, and not a submodule of each.
    """

    def __init__(self, state: LayerState, original: nn.Module, tables: ScaleTables, activation: Any, step: StepContext):
        super().__init__(state.decision, nn.Identity(), state.bias, activation, step, state.own_factors)
        conv = (original.stride, original.padding, original.dilation, original.groups) if state.decision.type == "Conv2d" else None
        self.conv = conv
        self.register_buffer("packed", pack_codes(state.codes, state.decision.bits_w), persistent=False)
        self.register_buffer("zero_point", state.weight_zero_point, persistent=False)
        grouped = state.decision.granularity == "group"
        self.register_buffer("group_scale", state.weight_scale.float() if grouped else None, persistent=False)
        self.__dict__["tables"] = tables

    @property
    def operand(self) -> CodedOperand:
        """The integer weight."""
        buffers = cast("dict[str, Tensor]", self._buffers)
        d = self.decision
        return CodedOperand(buffers["packed"], buffers["zero_point"], d.bits_w, d.shape, buffers["group_scale"], self.conv)

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """x: [..., K] or [B, I, H, W] float -> the same dtype. `unused`: diffusers passes a LoRA scale to some layers."""
        kind = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        # half precision cannot hold sums of centred codes
        kind = kind if kind in (torch.float32, torch.float64, torch.bfloat16) else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return self.combine(x.to(kind)).to(x.dtype)

    def combine(self, x: Tensor) -> Tensor:
        s_out, s_in = self.tables.of(self.decision.name)
        operand = self.operand
        if self.decision.bits_a is None:
            return scaled_product(x, s_out, s_in, self.bias, operand)
        x = x.float() if s_in is None else x.float() * operand.along(s_in, x)
        centred, x_scale = self.centred_input(x if self.pre_scale is None else x * operand.along(self.pre_scale, x))
        sums = scaled_product(centred, torch.ones_like(s_out[..., :1]).expand(s_out.shape[-1]), None, None, operand) * x_scale
        y = sums * operand.along(s_out, sums)
        return y if self.bias is None else y + operand.along(self.bias, y)

    @torch.no_grad()
    def dequantized_weight(self) -> Tensor:
        """f32 weight that the first interval's scales stand for: s_out (W_q - z) s_in; s_in of a grouped convolution is left out."""
        out, in_ = (None if table is None else table[0] for table in self.tables.tables())
        mine, wide = self.tables.slots[self.decision.name]
        assert out is not None
        weight = self.operand.centred(torch.float32) * out[mine].reshape(-1, *([1] * (len(self.decision.shape) - 1)))
        if in_ is None or wide is None or wide.stop - wide.start != weight.shape[1]:
            return weight
        return weight * in_[wide].reshape(1, -1, *([1] * (weight.ndim - 2)))


def build_scaled_(denoiser: nn.Module, state: QuantState, start: ScaleSet) -> tuple[ScaleTables, StepContext]:
    """Replace the layers of `state` by packed ones whose scales come from one table; step hooks are attached.

    Args:
        denoiser: changed in place: its float weights are gone afterwards, the tables are its submodule `scale_tables`.
        start: scales made for the integer weights of `state`; layers that it lacks keep theirs.

    Returns:
        The tables, and the step of the activation scales.

    Raises:
        InputError: the state belongs to another model.
    """
    tables: ScaleTables = ScaleTables.of_set(start)
    step = StepContext(state.step_keys, state.row_mode)
    for name, layer in state.layers.items():
        original = checked_layer(denoiser, name, layer)
        new: QuantizedLayer
        if name in start.layers:
            new = ScaledLayer(layer, original, tables, scales_of(layer), step)
        else:
            new = build_layer(original, layer.decision, CodedWeight(layer), layer.bias, scales_of(layer), step, layer.own_factors)
        replace_(denoiser, name, new.to(next(original.parameters()).device))
    load_floats_(denoiser, state.floats)
    tables.to(next(denoiser.parameters()).device)
    denoiser.add_module(TABLES, tables)
    attach_attention_(denoiser, state, step)
    step.attach(denoiser)
    tables.attach(denoiser)
    return tables, step
