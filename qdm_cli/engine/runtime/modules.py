"""Linear and Conv2d on stored integer codes: what runs in an exported denoiser.

    y = op(q_x - z_x, codes - z_w) * (s_x * s_w) + bias            (quantization specification 1.3)

The same order of operations as the simulated layers of `engine.quant.modules`, so that both give the same bits wherever the simulation's
sums are exact in float32. Codes become a backend's own layout at the first call; a move or a load drops it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.attention import attach_attention_
from qdm_cli.engine.quant.modules import conv2d_channels_last
from qdm_cli.engine.quant.state import LayerState, QuantState
from qdm_cli.engine.quant.state_apply import checked_layer, load_floats_, replace_
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.choice import Mode
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.packed import BUFFERS, Gated, PackedLayer
from qdm_kernels.conv2d_w8a8 import op as conv2d_op
from qdm_kernels.conv2d_w8a8.cpu import pointwise
from qdm_kernels.geometry import Conv2dGeometry
from qdm_kernels.layout import pack_weight
from qdm_kernels.linear_w8a8 import cpu as linear_cpu
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.native import tiles
from qdm_kernels.quantize.op import quantize

if TYPE_CHECKING:
    from qdm_cli.engine.runtime.split import PackedSplit


class PackedLinear(PackedLayer):
    """x: [..., K] float -> [..., O]."""

    op = "linear_w8a8"

    def _prepare(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Any:
        return linear_op.prepare(codes, scale, zero_point, bias)

    def _integer_forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        return self._product(x, scale, zero_point, self.prepared)

    @property
    def halves(self) -> tuple[Any, Any]:
        """The first and the second half of the outputs, packed apart, made once: value and gate of a gated layer."""
        if self._halves is None:
            middle, parts = self.spec.outputs // 2, self.stored_parts()
            first, second = ([None if part is None else part[a:b] for part in parts] for a, b in ((None, middle), (middle, None)))
            self._halves = linear_op.prepare(*first), linear_op.prepare(*second)
        return self._halves

    @property
    def gated(self) -> Gated | None:
        """Value and gate interleaved for a product that writes codes of what they make, made once; None where there is none."""
        if self._gated is None:
            codes, scale, zero, bias = self.stored_parts()
            fits = self.spec.outputs % (2 * 16) == 0 and tiles.takes(self.spec.outputs // 2, self.spec.terms)
            packed = linear_cpu.tiled_weight(tiles.interleave(codes), tiles.interleave(zero)) if fits else None
            own = (scale, bias) if packed is None else (tiles.interleave(scale), None if bias is None else tiles.interleave(bias))
            self._gated = Gated(packed, *own)
        return None if self._gated.packed is None else self._gated

    def _product(self, x: Tensor, scale: Tensor, zero_point: Tensor, prepared: Any) -> Tensor:
        with torch.no_grad():
            if (y := self.through_tiles(x, prepared)) is not None:
                return y
        codes = self.codes_for(x, scale, zero_point, prepared)
        return linear_op.linear(codes, scale, zero_point.reshape(()), prepared, out_dtype=_out_dtype(x))

    def product_together(self, x: Tensor, prepared: Any) -> Tensor | None:
        """Outputs of several layers that `reuse` packed as one; None when samples have zero points of their own."""
        if gpu.is_gpu(x.device):
            return gpu.product(self, x, prepared)
        scale, zero_point = self._activation(x)
        return self._product(x, scale, zero_point, prepared) if zero_point.numel() == 1 else None

    def _forward_by_zero_point(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Any zero point per token: sum (q - z)(w - z_w) = sum q (w - z_w) - z * sum (w - z_w), all in int32."""
        codes = quantize(x, scale, zero_point, cast(int, self.spec.bits_a))
        sums = linear_op.accumulate(codes, zero_point.new_zeros(()), self.prepared) - zero_point * self.row_sums
        y = sums.float() * (scale * self.weight_scale)
        bias = self._buffers["bias"]
        return y if bias is None else y + bias

    def _apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, weight, bias)

    def _rows(self, x: Tensor) -> int:
        return x.numel() // max(x.shape[-1], 1)

    def _per_output(self, value: Tensor) -> Tensor:
        return value


class PackedConv2d(PackedLayer):
    """x: [B, I, H, W] float -> [B, O, H', W']; a padded pixel is real 0."""

    op = "conv2d_w8a8"

    def _prepare(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Any:
        s = self.spec
        return conv2d_op.prepare(codes, scale, zero_point, bias, stride=s.stride, padding=s.padding, dilation=s.dilation, groups=s.groups)

    def _integer_forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        with torch.no_grad():
            if (y := self.through_tiles(x, self.prepared)) is not None:
                return y
        codes = self.codes_for(x, scale, zero_point, self.prepared)
        return conv2d_op.conv2d(codes, scale, zero_point.reshape(()), self.prepared, out_dtype=_out_dtype(x))

    def _apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        s = self.spec
        return conv2d_channels_last(x, weight, bias, s.stride, s.padding, s.dilation, s.groups)

    @functools.cached_property
    def _is_pointwise(self) -> bool:
        s = self.spec
        return Conv2dGeometry(s.stride, s.padding, s.dilation, s.groups).is_pointwise(s.kernel)

    def _apply_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_pointwise:
            return pointwise(x.contiguous(memory_format=torch.channels_last), weight, bias)
        return self._apply_op(x, weight, bias)

    def _rows(self, x: Tensor) -> int:
        (h, w), (p, q) = self.spec.stride, x.shape[2:]
        return x.shape[0] * (p // h) * (q // w)

    def _per_output(self, value: Tensor) -> Tensor:
        return value.reshape(-1, 1, 1)


def packed_from_spec(spec: LayerSpec, *, device: str | torch.device = "meta") -> PackedLayer | PackedSplit:
    """An empty packed layer."""
    if spec.split is not None:
        from qdm_cli.engine.runtime.split import PackedSplit

        return PackedSplit(spec, device=device)
    return (PackedLinear if spec.kind == "linear" else PackedConv2d)(spec, device=device)


def packed_from_state(state: LayerState, original: nn.Module, rows: int) -> PackedLayer | PackedSplit:
    """A packed layer that holds the codes and scales of `state`.

    Args:
        original: the float layer, for its geometry.
        rows: rows of the model's step tables.

    Raises:
        InputError: the layer has no integer form (`LayerSpec.of`).
        ValueError: codes outside their bits, or tables that do not fit the decision.
    """
    layer = packed_from_spec(LayerSpec.of(state.decision, original, rows))
    for part, half in [(layer, state)] if isinstance(layer, PackedLayer) else layer.parts(state):
        fill_(part, half)
    return layer


def fill_(layer: PackedLayer, state: LayerState) -> None:
    """Pack the codes of `state` and put them and its scales into a layer.

    Raises:
        ValueError: codes outside their bits, or tables that do not fit.
    """
    spec = layer.spec
    stored = state.codes if spec.kind == "linear" else state.codes.permute(0, 2, 3, 1).flatten(1)
    values = {"weight": pack_weight(stored.contiguous(), spec.bits_w)} | {k: getattr(state, k) for k in BUFFERS if k != "weight"}
    for name in spec.tensors():
        layer.load_buffer_(name, values[name])


def pack_denoiser_(denoiser: nn.Module, state: QuantState, mode: Mode = "exact") -> StepContext:
    """Replace the layers of `state` by packed ones in memory and attach the step hook: an exported model without files.

    Args:
        mode: `exact` = the bits of the simulation on every machine; `auto` = as fast as this one allows.

    Raises:
        InputError: the state belongs to another model.
    """
    step = StepContext(state.step_keys, state.row_mode)
    for name, layer in state.layers.items():
        packed = packed_from_state(layer, checked_layer(denoiser, name, layer), step.rows)
        packed.step = step
        replace_(denoiser, name, packed)
    load_floats_(denoiser, state.floats)
    attach_attention_(denoiser, state, step)
    step.attach(denoiser)
    from qdm_cli.engine.runtime.scales import apply_scales_  # these two know packed layers themselves
    from qdm_cli.engine.runtime.tune import tune_

    if state.scales is not None:
        apply_scales_(denoiser, state.scales)
    tune_(denoiser, mode)
    return step


def _out_dtype(x: Tensor) -> torch.dtype:
    """What a kernel writes for an input x: its dtype where kernels know it."""
    return x.dtype if x.dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
