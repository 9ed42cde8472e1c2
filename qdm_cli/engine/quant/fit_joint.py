"""Rounding and activation step sizes of a unit together, on quantized inputs (TCAQ-DM; quantization spec 5.1).

Weights learnt against float activations do not see the error of 4-bit activations; learnt together, each makes up for the other's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from qdm_cli.engine.quant.adaround import BetaSchedule, RoundedWeight, rounding_penalty
from qdm_cli.engine.quant.fit_rounding import RoundingSettings
from qdm_cli.engine.quant.grid import QParams
from qdm_cli.engine.quant.modules import CodedWeight, QuantizedLayer, StepScales, build_layer, weight_before_codes
from qdm_cli.engine.quant.reconstruction import Pair, checked_error, unit_error, unit_output, unit_rng
from qdm_cli.engine.quant.row_adam import RowAdam
from qdm_cli.engine.quant.state import LayerState
from qdm_cli.engine.quant.state_apply import replace_, scales_of

if TYPE_CHECKING:
    from qdm_cli.engine.quant.unit_data import UnitData
    from qdm_cli.engine.quant.units import Unit


@dataclass(frozen=True)
class JointSettings:
    """How both are learnt.

    Attributes:
        rounding: also says how many updates there are, of how many samples.
        step_lr: rate of the logarithm of a step size, cosine to 0.
        bias_lr: rate of the biases, cosine to 0; 0 = they stay.
        exponent: of the output error.
        keep: share of the codes found so far in the rounding to start from; 0 = the float weight, 1 = those codes.
    """

    rounding: RoundingSettings
    step_lr: float
    bias_lr: float = 0.0
    exponent: float = 2.0
    keep: float = 0.0


class JointFit:
    """Rounding of every weight and step size of every static activation of a unit, and its biases where asked; zero points stay.

    Args:
        layers: codes and tables to start from; learnt ones replace theirs in `self.layers`.
        seed: of the minibatches, joined with the unit's name.
    """

    def __init__(self, pair: Pair, layers: dict[str, LayerState], settings: JointSettings, seed: int):
        self.pair, self.settings, self.seed = pair, settings, seed
        self.layers = dict(layers)

    def start(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Codes and tables as they are."""
        return self._tensors({name: self.layers[name] for name in unit.layers})

    def learns(self, unit: Unit) -> bool:
        """Has the unit weights of few enough bits, or a static activation?"""
        return any(self._rounds(name) or self.layers[name].act_scale is not None for name in unit.layers)

    def fit(self, unit: Unit, data: UnitData) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Learn one unit; what it started from stays where that is better on the checked samples."""
        start = self.start(unit)
        self.settle(unit, start)
        before = self._error(unit, data)
        weights, scales = self._soften(unit)
        biases = self._free_biases(unit)
        self._optimise(unit, weights, scales, biases, data)
        undecided = [weight.undecided().flatten() for weight in weights.values()]
        learnt = self._tensors({name: self._learnt(name, weights, scales, biases) for name in unit.layers})
        self.settle(unit, learnt)
        after = self._error(unit, data)
        better = after < before  # false for NaN
        return learnt if better else start, {
            "error_start": before,
            "error": after if better else before,
            "undecided": float(torch.cat(undecided).double().mean()) if undecided else 0.0,
            "kept": "learnt" if better else "start",
        }

    def settle(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> None:
        """Give the student these codes and tables."""
        for name in unit.layers:
            self.layers[name] = replace(self.layers[name], **{key: tensors[f"{name}:{key}"] for key in self._keys(self.layers[name])})
            self._put(name, CodedWeight(self.layers[name]))

    @staticmethod
    def _keys(state: LayerState) -> tuple[str, ...]:
        return tuple(key for key in ("codes", "act_scale", "bias") if getattr(state, key) is not None)

    def _tensors(self, layers: dict[str, LayerState]) -> dict[str, torch.Tensor]:
        return {f"{name}:{key}": getattr(state, key) for name, state in layers.items() for key in self._keys(state)}

    def _rounds(self, name: str) -> bool:
        return self.layers[name].decision.bits_w <= self.settings.rounding.max_bits

    def _put(self, name: str, weight: torch.nn.Module) -> QuantizedLayer:
        state, original = self.layers[name], self.pair.full.get_submodule(name)
        layer = build_layer(original, state.decision, weight, state.bias, scales_of(state), self.pair.step, state.own_factors)
        replace_(self.pair.student, name, layer.to(self.pair.device))
        return layer

    def _soften(self, unit: Unit) -> tuple[dict[str, RoundedWeight], dict[str, StepScales]]:
        weights, scales = {}, {}
        for name in unit.layers:
            state, device = self.layers[name], self.pair.device
            source: torch.nn.Module = CodedWeight(state)
            if self._rounds(name):
                params = QParams(state.weight_scale.to(device), state.weight_zero_point.float().to(device))
                weight = weight_before_codes(cast(torch.Tensor, self.pair.full.get_submodule(name).weight), state.pre_scale)
                source = weights[name] = RoundedWeight(weight, state.decision, params)
                source.lean_(state.codes.to(device), self.settings.keep)
            layer = self._put(name, source)
            if layer.scales is not None:
                scales[name] = layer.scales.train_()
                layer.scales.zero_point.requires_grad_(False)
        return weights, scales

    def _free_biases(self, unit: Unit) -> dict[str, torch.nn.Parameter]:
        if not self.settings.bias_lr:
            return {}
        layers = {name: cast(QuantizedLayer, self.pair.student.get_submodule(name)) for name in unit.layers}
        return {name: layer.bias.requires_grad_(True) for name, layer in layers.items() if layer.bias is not None}

    def _optimise(
        self,
        unit: Unit,
        weights: dict[str, RoundedWeight],
        scales: dict[str, StepScales],
        biases: dict[str, torch.nn.Parameter],
        data: UnitData,
    ) -> None:
        s, module = self.settings, self.pair.student.get_submodule(unit.name)
        optimizers: list[torch.optim.Optimizer] = []
        falling: list[tuple[torch.optim.Optimizer, float]] = []  # with the rate that falls along a cosine
        if weights:
            optimizers.append(torch.optim.Adam([weight.v for weight in weights.values()], lr=s.rounding.lr))
        if scales:  # rows of a step table that are not in the minibatch must not move
            falling.append((RowAdam([table.log_scale for table in scales.values()], lr=s.step_lr), s.step_lr))
        if biases:
            falling.append((torch.optim.Adam(list(biases.values()), lr=s.bias_lr), s.bias_lr))
        optimizers += [optimizer for optimizer, _ in falling]
        schedule, rng = BetaSchedule(s.rounding.iterations, s.rounding.warmup), unit_rng(self.seed, unit)
        for iteration in range(s.rounding.iterations):
            minibatch = data.batch(data.draw(s.rounding.batch, rng), self.pair.device)
            loss = unit_error(unit_output(module, minibatch, self.pair.step), minibatch.targets, s.exponent)
            beta = schedule.at(iteration)
            if beta is not None and weights:
                penalties = torch.stack([rounding_penalty(weight.h(), beta) for weight in weights.values()])
                loss = loss + s.rounding.penalty * penalties.sum()
            for optimizer, lr in falling:
                optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * iteration / s.rounding.iterations))
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()

    def _learnt(
        self, name: str, weights: dict[str, RoundedWeight], scales: dict[str, StepScales], biases: dict[str, torch.nn.Parameter]
    ) -> LayerState:
        state = self.layers[name]
        if name in weights:
            state = replace(state, codes=weights[name].hard_codes().cpu())
        if name in biases:
            state = replace(state, bias=biases[name].detach().cpu().clone())
        return replace(state, act_scale=scales[name].tables()[0].detach().cpu().clone()) if name in scales else state

    def _error(self, unit: Unit, data: UnitData) -> float:
        module = self.pair.student.get_submodule(unit.name)
        return checked_error(module, data, self.pair.step, self.pair.device, self.settings.rounding.batch)
