"""Activation ranges measured again along a cached trajectory (caching spec 3.2, 3.5): a reused tensor has another range than a fresh one.

With one row of ranges per step, full and partial calls have ranges of their own; a layer that a step does not run keeps its row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.drive import Loop, following
from qdm_cli.engine.caching.schedule import Schedule
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.calibration import VALUES_PER_STEP, RangeRule, input_parts, join_parts, parts_of, thin, watched_inputs
from qdm_cli.engine.quant.grid import IntGrid, QParams
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState

Values = dict[tuple[str, int], list[torch.Tensor]]


def remeasured(
    state: QuantState,
    loop: Loop,
    schedule: Schedule,
    *,
    starts: list[tuple[int, int]],
    corrections: Mapping[str, torch.Tensor] | None = None,
    rule: RangeRule | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> QuantState:
    """The state with static activation ranges of the full-precision model's own cached trajectories.

    Layers with factors per input channel keep theirs: they were chosen together with their ranges.

    Args:
        loop: of the full-precision model.
        starts: (first sample, samples) of each batch of trajectories.
        rule: how a range is chosen; None = least error.
    """
    rule = rule or RangeRule("mse")
    step = StepContext(state.step_keys, "nearest")
    chosen = {name: layer.decision for name, layer in state.layers.items() if layer.act_scale is not None and layer.pre_scale is None}
    values: Values = {}
    for number, (start, count) in enumerate(starts):
        with following(loop, schedule, corrections), _kept_inputs(loop.loaded.denoiser, chosen, step, values, len(starts)):
            loop.run(start, count)
        progress(number + 1, len(starts))
    return replace(state, layers={name: _with_ranges(layer, values, rule) for name, layer in state.layers.items()})


@contextmanager
def _kept_inputs(denoiser: nn.Module, layers: dict[str, LayerDecision], step: StepContext, values: Values, batches: int) -> Any:
    """Keep a sample of each layer's input by the row of the step."""
    rng = torch.Generator().manual_seed(0)

    def keep(name: str, x: torch.Tensor) -> None:
        row = int(step.lower) if layers[name].timestep_aware else 0
        for part, half in zip(parts_of(layers[name]), input_parts(x, layers[name]), strict=True):
            values.setdefault((part, row), []).append(thin(half, VALUES_PER_STEP // batches, rng))

    handle = step.attach(denoiser)
    try:
        with watched_inputs(denoiser, layers, keep):
            yield
    finally:
        handle.remove()


def _with_ranges(layer: LayerState, values: Values, rule: RangeRule) -> LayerState:
    """The layer with new rows where its input was seen."""
    decision = layer.decision
    if (
        layer.act_scale is None
        or layer.act_zero_point is None
        or ((parts_of(decision)[0], 0) not in values and not decision.timestep_aware)
    ):
        return layer
    scale, zero = layer.act_scale.clone(), layer.act_zero_point.clone()
    for row in range(len(scale)):
        seen = [torch.cat(values[part, row]) for part in parts_of(decision) if (part, row) in values]
        if seen:
            found = join_parts([_range(rule, part, decision) for part in seen])
            scale[row], zero[row] = found.scale[0], found.zero_point[0].to(zero.dtype)
    return replace(layer, act_scale=scale, act_zero_point=zero)


def _range(rule: RangeRule, values: torch.Tensor, decision: LayerDecision) -> QParams:
    found = rule.choose(values, IntGrid(decision.bits_a or 8), symmetric=decision.act_symmetric)
    return QParams(found.scale.reshape(1), found.zero_point.reshape(1))
