"""Activation tables with one row per time-step interval instead of one per step (TALSQ in groups; timestep clustering of 2312.09181)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qdm_cli.engine.diffusion.intervals import interval_of
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.grid import IntGrid, QParams, qparams_from_range
from qdm_cli.engine.quant.state import LayerState, QuantState


def grouped_rows(state: QuantState, keys: Tensor) -> QuantState:
    """The same state with one row per interval: the least range that holds those of all its steps.

    An interval without a step takes the range of the nearest step.

    Args:
        state: with a row per step.
        keys: f64 [k], smallest timestep of each interval.

    Raises:
        InputError: attentions have tables per step already.
    """
    if any(len(attention.scales) > 1 for attention in state.attention.values()):
        what = "this method gives attentions a row per step; set quantize.attention or the groups to null"
        raise InputError(f"calibrate.timestep_groups: {what}", path="calibrate.timestep_groups")
    steps = state.step_keys.tolist()
    belongs = interval_of(keys, steps)
    members = [[i for i, own in enumerate(belongs) if own == group] for group in range(len(keys))]
    ends = [*keys.tolist(), 2 * max(steps)]
    for group, own in enumerate(members):
        if not own:
            middle = (ends[group] + ends[group + 1]) / 2
            own.append(min(range(len(steps)), key=lambda i: abs(steps[i] - middle)))
    layers = {name: _grouped(layer, members) if _has_rows(layer) else layer for name, layer in state.layers.items()}
    return replace(state, layers=layers, step_keys=keys.double(), row_mode="interval")


def _has_rows(layer: LayerState) -> bool:
    return layer.act_scale is not None and len(layer.act_scale) > 1


def _grouped(layer: LayerState, members: list[list[int]]) -> LayerState:
    decision = layer.decision
    assert layer.act_scale is not None and layer.act_zero_point is not None and decision.bits_a is not None
    grid, scale, zero = IntGrid(decision.bits_a), layer.act_scale, layer.act_zero_point.float()
    if decision.act_symmetric:
        widest = torch.stack([scale[rows].amax(0) for rows in members])
        return replace(layer, act_scale=widest, act_zero_point=torch.zeros_like(widest, dtype=torch.int8))
    low, high = (grid.lo - zero) * scale, (grid.hi - zero) * scale
    joined: QParams = qparams_from_range(
        torch.stack([low[rows].amin(0) for rows in members]), torch.stack([high[rows].amax(0) for rows in members]), grid, symmetric=False
    )
    return replace(layer, act_scale=joined.scale, act_zero_point=joined.zero_point.to(torch.int8))
