"""A denoiser whose integer weights stay packed and whose scales train: PEQA (s_out per channel), TuneQDM (s_out, s_in per interval)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.modules import QuantizedLayer
from qdm_cli.engine.quant.scale_function import CodedOperand, pack_codes, scaled_product
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

    Raises:
        InputError: a layer has two weight ranges.
    """
    layers = {}
    for name, layer in state.layers.items():
        if layer.decision.split is not None:
            raise InputError(f"{name} has two weight ranges, whose scales cannot be adapted. Calibrate without quantize.split_shortcuts.")
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
        for name, layer in state.layers.items()
    )


TABLES = "scale_tables"
"""Name under which a denoiser holds its `ScaleTables`, so that they move with it."""


class ScaleTables(nn.Module):
    """All scales of a denoiser as two flat tables, so that choosing an interval and updating take a few operations, not one per layer.

    s = s_start * exp(delta): a step of the optimizer is a relative change whatever the scale, and an untouched scale is returned to the
    bit. Row = interval; after a per-sample timestep `current` gives one row per sample.

    Args:
        start: initial scales.
    """

    def __init__(self, start: ScaleSet):
        super().__init__()
        self.start = start
        self.step = StepContext(start.keys, "interval")
        self.register_buffer("base_out", torch.cat([layer.out for layer in start.layers.values()], 1), persistent=False)
        inputs = [layer.in_ for layer in start.layers.values() if layer.in_ is not None]
        self.register_buffer("base_in", torch.cat(inputs, 1) if inputs else None, persistent=False)
        self.delta_out = nn.Parameter(torch.zeros_like(cast(Tensor, self.base_out)), requires_grad=False)
        self.delta_in = nn.Parameter(torch.zeros_like(cast(Tensor, self.base_in)), requires_grad=False) if inputs else None
        self.slots: dict[str, tuple[slice, slice | None]] = {}
        out = in_ = 0
        for name, layer in start.layers.items():
            width = 0 if layer.in_ is None else layer.in_.shape[1]
            self.slots[name] = (slice(out, out + layer.out.shape[1]), slice(in_, in_ + width) if width else None)
            out, in_ = out + layer.out.shape[1], in_ + width
        self._now: tuple[Tensor, Tensor | None] | None = None

    def tables(self) -> tuple[Tensor, Tensor | None]:
        """s_out [n, sum of O] and s_in [n, sum of I] or None."""
        out = cast(Tensor, self.base_out) * self.delta_out.exp()
        return out, None if self.delta_in is None else cast(Tensor, self.base_in) * self.delta_in.exp()

    def select(self) -> None:
        """Read the rows of the current timestep, for all layers at once."""
        out, in_ = self.tables()
        self._now = self.step.pick(out), None if in_ is None else self.step.pick(in_)

    def of(self, name: str) -> tuple[Tensor, Tensor | None]:
        """s_out [O] or [B, O] and s_in of a layer at the current timestep."""
        if self._now is None:
            self.select()
        out, in_ = cast("tuple[Tensor, Tensor | None]", self._now)
        mine, wide = self.slots[name]
        return out[..., mine], None if in_ is None or wide is None else in_[..., wide]

    def attach(self, denoiser: nn.Module) -> None:
        """Choose the interval from the `timestep` of every call of `denoiser`."""
        self.step.attach(denoiser)
        denoiser.register_forward_pre_hook(self._before_forward)

    def _before_forward(self, module: nn.Module, args: Any) -> None:
        self.select()

    def __getstate__(self) -> dict[str, Any]:
        """A copy reads its own rows: those of the last call belong to a graph, which cannot be copied."""
        return {**self.__dict__, "_now": None}

    def scale_set(self, **about: Any) -> ScaleSet:
        """The scales as they are now, on the CPU."""
        out, in_ = (None if table is None else table.detach().float().cpu() for table in self.tables())
        assert out is not None
        layers = {
            name: LayerScales(out[:, mine].clone(), None if in_ is None or wide is None else in_[:, wide].clone())
            for name, (mine, wide) in self.slots.items()
        }
        return replace(self.start, layers=layers, about={**self.start.about, **about})


class ScaledLayer(QuantizedLayer):
    """Linear or Conv2d on packed codes with scales from `ScaleTables`; activations are quantized after s_in where the policy says so.

    Args:
        state: codes, bias and activation tables.
        original: the float layer, for its geometry; its weight is not used.
        tables: shared by all layers of the denoiser, and not a submodule of each.
    """

    def __init__(self, state: LayerState, original: nn.Module, tables: ScaleTables, activation: Any, step: StepContext):
        super().__init__(state.decision, nn.Identity(), state.bias, activation, step)
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
        centred, x_scale = self.centred_input(x)
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


def build_scaled_(denoiser: nn.Module, state: QuantState, start: ScaleSet) -> ScaleTables:
    """Replace the layers of `state` by packed ones whose scales come from one table; step hooks are attached.

    Args:
        denoiser: changed in place: its float weights are gone afterwards, the tables are its submodule `scale_tables`.
        start: scales of every layer of `state`, made for its integer weights.

    Raises:
        InputError: the state belongs to another model.
    """
    tables, step = ScaleTables(start), StepContext(state.step_keys, state.row_mode)
    for name, layer in state.layers.items():
        original = checked_layer(denoiser, name, layer)
        scaled = ScaledLayer(layer, original, tables, scales_of(layer), step)
        replace_(denoiser, name, scaled.to(next(original.parameters()).device))
    load_floats_(denoiser, state.floats)
    tables.to(next(denoiser.parameters()).device)
    denoiser.add_module(TABLES, tables)
    step.attach(denoiser)
    tables.attach(denoiser)
    return tables
