"""A layer on two concatenated inputs, as the sum of two packed layers with scales of their own (Q-Diffusion, section 3.3).

    y = op(x_deep) + (op(x_skip) + bias)

The order of the additions is that of the simulation (`QuantizedLayer.combine_parts`), so that both give the same bits.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from qdm_cli.engine.runtime.layer import PARTS, LayerSpec
from qdm_cli.engine.runtime.modules import packed_from_spec
from qdm_cli.engine.runtime.packed import PackedLayer

if TYPE_CHECKING:
    from qdm_cli.engine.diffusion.step_context import StepContext
    from qdm_cli.engine.quant.state import LayerState


class PackedSplit(nn.Module):
    """x: [B, I, H, W] or [..., I] float -> the outputs of a PackedConv2d or PackedLinear. Halves: `deep`, `skip`.

    Raises:
        ValueError: the spec is not split, or grouped.
    """

    deep: PackedLayer
    skip: PackedLayer

    def __init__(self, spec: LayerSpec, *, device: str | torch.device = "meta"):
        super().__init__()
        self.spec = spec
        for part, half in zip(PARTS, spec.halves, strict=True):
            self.add_module(part, packed_from_spec(half, device=device))

    @property
    def step(self) -> StepContext:
        return self.deep.step

    @step.setter
    def step(self, step: StepContext) -> None:
        self.deep.step = self.skip.step = step

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """`unused`: diffusers passes a LoRA scale to some layers."""
        # summed in f32, as the simulation does; on other devices half precision keeps its own kernels
        whole = x.float() if x.device.type == "cpu" else x
        deep, skip = whole.split([self.deep.spec.inputs, self.skip.spec.inputs], dim=1 if self.spec.kind == "conv2d" else -1)
        return (self.deep(_dense_as(deep, whole)) + self.skip(_dense_as(skip, whole))).to(x.dtype)

    def dequantized_weight(self) -> Tensor:
        """f32 weight with the quantization error in it."""
        return torch.cat([self.deep.dequantized_weight(), self.skip.dequantized_weight()], 1)

    def parts(self, state: LayerState) -> list[tuple[PackedLayer, LayerState]]:
        """The halves with the part of a split layer's state that each holds."""
        codes = state.codes.split(list(state.decision.input_halves), dim=1)
        return [(self.deep, half_state(state, 0, codes[0])), (self.skip, half_state(state, 1, codes[1]))]

    def extra_repr(self) -> str:
        return f"{self.spec.inputs} = {self.deep.spec.inputs} + {self.skip.spec.inputs}, {self.spec.outputs}"


def _dense_as(part: Tensor, whole: Tensor) -> Tensor:
    """A slice of channels as a dense tensor in the memory format of the whole."""
    channels_last = whole.ndim == 4 and not whole.is_contiguous() and whole.is_contiguous(memory_format=torch.channels_last)
    return part.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def half_state(state: LayerState, index: int, codes: Tensor) -> LayerState:
    """One half of a split layer as a layer of one range; its decision's shape is that of `codes`."""
    return replace(
        state,
        decision=replace(state.decision, shape=tuple(codes.shape), split=None),
        codes=codes,
        weight_scale=_column(state.weight_scale, index),
        weight_zero_point=_column(state.weight_zero_point, index),
        act_scale=None if state.act_scale is None else _column(state.act_scale, index),
        act_zero_point=None if state.act_zero_point is None else _column(state.act_zero_point, index),
    )


def _column(table: Tensor, index: int) -> Tensor:
    """A column with stride 1: `contiguous` would leave a column of one row as it is."""
    return table[:, index].clone(memory_format=torch.contiguous_format)
