"""Weights of a unit by AdaRound on the unit's output error (Q-Diffusion, section 3.2; quantization spec 3.1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch

from qdm_cli.engine.quant.adaround import BetaSchedule, RoundedWeight, rounding_penalty
from qdm_cli.engine.quant.grid import QParams
from qdm_cli.engine.quant.modules import CodedWeight, build_layer, weight_before_codes
from qdm_cli.engine.quant.reconstruction import Pair, checked_error, unit_error, unit_output, unit_rng
from qdm_cli.engine.quant.state import LayerState
from qdm_cli.engine.quant.state_apply import replace_

if TYPE_CHECKING:
    from qdm_cli.engine.quant.unit_data import UnitData
    from qdm_cli.engine.quant.units import Unit

MOSTLY_DECIDED = 0.02
"""Share of undecided weights above which a unit is reported: its hard error is no longer the one that was optimised."""


@dataclass(frozen=True)
class RoundingSettings:
    """How rounding is learnt. `penalty`: weight of the regulariser; `max_bits`: units with nothing below are rounded to nearest."""

    iterations: int
    batch: int
    lr: float
    penalty: float = 0.01
    warmup: float = 0.2
    max_bits: int = 8


class RoundingFit:
    """AdaRound of every weight of a unit together, activations in floats.

    Args:
        layers: codes and scales to start from, rounded to nearest; learnt codes replace theirs in `self.layers`.
        seed: of the minibatches, joined with the unit's name.
    """

    def __init__(self, pair: Pair, layers: dict[str, LayerState], settings: RoundingSettings, seed: int):
        self.pair, self.settings, self.seed = pair, settings, seed
        self.layers = dict(layers)

    def start(self, unit: Unit) -> dict[str, torch.Tensor]:
        """Codes rounded to nearest."""
        return {name: self.layers[name].codes for name in unit.layers}

    def learns(self, unit: Unit) -> bool:
        """Has the unit weights of few enough bits?"""
        return any(self.layers[name].decision.bits_w <= self.settings.max_bits for name in unit.layers)

    def fit(self, unit: Unit, data: UnitData) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Learn the rounding of one unit; nearest rounding stays where it is better on the checked samples."""
        nearest = self.start(unit)
        self.settle(unit, nearest)
        before = self._error(unit, data)
        weights = self._soften(unit)
        self._optimise(unit, weights, data)
        codes = {name: weight.hard_codes().cpu() for name, weight in weights.items()}
        undecided = float(torch.cat([weight.undecided().flatten() for weight in weights.values()]).double().mean())
        self.settle(unit, codes)
        after = self._error(unit, data)
        # written so that NaN keeps the nearest codes
        kept = codes if after < before else nearest
        return kept, {
            "error_nearest": before,
            "error": min(after, before) if after == after else before,
            "undecided": undecided,
            "kept": "learnt" if kept is codes else "nearest",
        }

    def settle(self, unit: Unit, codes: dict[str, torch.Tensor]) -> None:
        """Give the student these codes; activations of the unit stay floats."""
        for name in unit.layers:
            self.layers[name] = replace(self.layers[name], codes=codes[name])
            self._put(name, CodedWeight(self.layers[name]))

    def _put(self, name: str, weight: torch.nn.Module) -> None:
        state = self.layers[name]
        decision = replace(state.decision, bits_a=None)
        layer = build_layer(self.pair.full.get_submodule(name), decision, weight, state.bias, None, self.pair.step, state.own_factors)
        replace_(self.pair.student, name, layer.to(self.pair.device))

    def _soften(self, unit: Unit) -> dict[str, RoundedWeight]:
        weights = {}
        for name in unit.layers:
            state, original = self.layers[name], self.pair.full.get_submodule(name)
            params = QParams(state.weight_scale.to(self.pair.device), state.weight_zero_point.float().to(self.pair.device))
            weight = weight_before_codes(cast(torch.Tensor, original.weight), state.pre_scale)
            weights[name] = RoundedWeight(weight, state.decision, params)
            self._put(name, weights[name])
        return weights

    def _optimise(self, unit: Unit, weights: dict[str, RoundedWeight], data: UnitData) -> None:
        s, module = self.settings, self.pair.student.get_submodule(unit.name)
        optimizer = torch.optim.Adam([weight.v for weight in weights.values()], lr=s.lr)
        schedule = BetaSchedule(s.iterations, s.warmup)
        rng = unit_rng(self.seed, unit)
        for iteration in range(s.iterations):
            minibatch = data.batch(data.draw(s.batch, rng), self.pair.device)
            loss = unit_error(unit_output(module, minibatch, self.pair.step), minibatch.targets)
            beta = schedule.at(iteration)
            if beta is not None:
                loss = loss + s.penalty * torch.stack([rounding_penalty(weight.h(), beta) for weight in weights.values()]).sum()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _error(self, unit: Unit, data: UnitData) -> float:
        module = self.pair.student.get_submodule(unit.name)
        return checked_error(module, data, self.pair.step, self.pair.device, self.settings.batch)


def undecided_warning(figures: list[dict[str, Any]]) -> str | None:
    """One line about units with more than 2 % undecided weights; None = there are none."""
    loose = sorted((figure for figure in figures if figure["undecided"] > MOSTLY_DECIDED), key=lambda figure: -figure["undecided"])
    if not loose:
        return None
    worst = f"{100 * loose[0]['undecided']:.1f} % in {loose[0]['unit']}"
    return (
        f"{len(loose)} of {len(figures)} units end with more than 2 % of their weights between two codes ({worst}). "
        "Raise calibrate.rounding.iterations or calibrate.rounding.penalty."
    )
