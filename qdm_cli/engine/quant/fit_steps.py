"""Activation step sizes of a unit by LSQ (Esser et al., ICLR 2020) on the unit's output error, weights fixed (quantization spec 3.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from qdm_cli.engine.quant.modules import CodedWeight, QuantizedLayer, StepScales, build_layer
from qdm_cli.engine.quant.reconstruction import Pair, checked_error, unit_error, unit_output, unit_rng
from qdm_cli.engine.quant.row_adam import RowAdam
from qdm_cli.engine.quant.state import LayerState
from qdm_cli.engine.quant.state_apply import replace_, scales_of

if TYPE_CHECKING:
    from qdm_cli.engine.quant.unit_data import UnitData
    from qdm_cli.engine.quant.units import Unit


@dataclass(frozen=True)
class StepSettings:
    """How step sizes are learnt. `lr`: of the logarithm of a step size, cosine to 0; `exponent`: of the output error."""

    iterations: int
    batch: int
    lr: float
    exponent: float = 2.4


class StepFit:
    """Step sizes of every static activation of a unit together; zero points stay.

    Args:
        layers: final codes and initial tables; learnt tables replace theirs in `self.layers`.
    """

    def __init__(self, pair: Pair, layers: dict[str, LayerState], settings: StepSettings, seed: int):
        self.pair, self.settings, self.seed = pair, settings, seed
        self.layers = dict(layers)

    def start(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Measured tables of the unit's static activations."""
        return {name: scale for name in unit.layers if (scale := self.layers[name].act_scale) is not None}

    def learns(self, unit: Unit) -> bool:
        """Has the unit static activations?"""
        return bool(self.settings.iterations and self.start(unit))

    def fit(self, unit: Unit, data: UnitData) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Learn the tables of one unit; the initial ones stay where they are better on the checked samples."""
        start = self.start(unit)
        self.settle(unit, start)
        before = self._error(unit, data)
        scales = self._trainable(unit)
        self._optimise(unit, scales, data)
        learnt = {name: table.tables()[0].detach().cpu().clone() for name, table in scales.items()}
        self.settle(unit, learnt)
        after = self._error(unit, data)
        better = after < before
        return learnt if better else start, {
            "error_start": before,
            "error": after if better else before,
            "kept": "learnt" if better else "start",
        }

    def settle(self, unit: Unit, scales: dict[str, torch.Tensor]) -> None:
        """Give the student these tables and quantize the unit's activations."""
        for name in unit.layers:
            state = self.layers[name]
            if name in scales:
                state = self.layers[name] = replace(state, act_scale=scales[name])
            original = self.pair.full.get_submodule(name)
            layer = build_layer(
                original, state.decision, CodedWeight(state), state.bias, scales_of(state), self.pair.step, state.own_factors
            )
            replace_(self.pair.student, name, layer.to(self.pair.device))

    def _trainable(self, unit: Unit) -> dict[str, StepScales]:
        found = {}
        for name in unit.layers:
            layer = cast(QuantizedLayer, self.pair.student.get_submodule(name))
            if layer.scales is not None:
                found[name] = layer.scales.train_()
                layer.scales.zero_point.requires_grad_(False)
        return found

    def _optimise(self, unit: Unit, scales: dict[str, StepScales], data: UnitData) -> None:
        s, module = self.settings, self.pair.student.get_submodule(unit.name)
        # rows of a step table that are not in the minibatch must not move
        optimizer = RowAdam([table.log_scale for table in scales.values()], lr=s.lr)
        rng = unit_rng(self.seed + 1, unit)
        for iteration in range(s.iterations):
            minibatch = data.batch(data.draw(s.batch, rng), self.pair.device)
            loss = unit_error(unit_output(module, minibatch, self.pair.step), minibatch.targets, s.exponent)
            optimizer.param_groups[0]["lr"] = s.lr * 0.5 * (1 + math.cos(math.pi * iteration / s.iterations))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _error(self, unit: Unit, data: UnitData) -> float:
        module = self.pair.student.get_submodule(unit.name)
        return checked_error(module, data, self.pair.step, self.pair.device, self.settings.batch)
