"""From a float denoiser to a reconstructed quantized state: weights first, then activation ranges, then step sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
from qdm_cli.engine.quant.calibration import RangeRule, activation_tables, code_layer
from qdm_cli.engine.quant.fit_rounding import RoundingFit, RoundingSettings, undecided_warning
from qdm_cli.engine.quant.fit_steps import StepFit, StepSettings
from qdm_cli.engine.quant.grid import QParams, RangeMethod
from qdm_cli.engine.quant.reconstruction import CalibrationCalls, Pair, evenly_spaced, run_units, write_report
from qdm_cli.engine.quant.running_range import running_tables
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext


@dataclass(frozen=True)
class Plan:
    """Everything that reconstruction is told, resolved.

    Attributes:
        weight_range, activation_range: how scales start.
        calibration_steps, samples_per_step: which captured calls are used.
        memory: bytes of unit data held at a time.
        rounding, steps: the two phases.
    """

    weight_range: RangeMethod
    activation_range: Literal["max", "mse", "running"]
    calibration_steps: int
    samples_per_step: int
    memory: int
    rounding: RoundingSettings
    steps: StepSettings


def reconstruct(denoiser: nn.Module, plan: Plan, ctx: RunContext, *, decisions: list[LayerDecision], store: TrajectoryStore) -> QuantState:
    """Quantize a denoiser unit by unit (quantization spec 3.1 and 7.8).

    Args:
        denoiser: the full-precision model, left as it was.

    Raises:
        GateFailed: a weight or activation is NaN or infinite, or a layer is never reached.
    """
    chosen = {d.name: d for d in decisions if d.skipped_why is None}
    calls = CalibrationCalls(store, evenly_spaced(store.timesteps(), plan.calibration_steps), plan.samples_per_step)
    aware = any(d.timestep_aware for d in chosen.values())
    keys = torch.tensor(store.timesteps() if aware else [0.0], dtype=torch.float64)
    pair = Pair.of(denoiser, calls, StepContext(keys))
    layers = {name: code_layer(denoiser.get_submodule(name), d, RangeRule(plan.weight_range), None).cpu() for name, d in chosen.items()}
    units = pair.units(list(chosen))

    rounding = RoundingFit(pair, layers, plan.rounding, ctx.recipe.seed)
    report = {"weights": run_units("weights", units, pair, rounding, memory=plan.memory, ctx=ctx)}
    if loose := undecided_warning(report["weights"]):
        ctx.warn(loose)
    layers = with_ranges(rounding.layers, pair, plan, store, ctx)
    if plan.steps.iterations and any(layer.act_scale is not None for layer in layers.values()):
        steps = StepFit(pair, layers, plan.steps, ctx.recipe.seed)
        report["steps"] = run_units("steps", units, pair, steps, memory=plan.memory, ctx=ctx)
        layers = steps.layers
    write_report(ctx, report)
    return QuantState(layers={name: layers[name] for name in chosen}, skipped=tuple(d for d in decisions if d.skipped_why), step_keys=keys)


def with_ranges(layers: dict[str, LayerState], pair: Pair, plan: Plan, store: TrajectoryStore, ctx: RunContext) -> dict[str, LayerState]:
    """Activation ranges measured on the student, whose weights are final."""
    chosen = {name: layer.decision for name, layer in layers.items()}
    tables: dict[str, Any]
    if plan.activation_range == "running":
        tables = running_tables(pair, chosen, ctx.recipe.seed)
    else:
        rule = RangeRule(plan.activation_range)
        tables = activation_tables(pair.student, chosen, store, rule, plan.samples_per_step, ctx)
    return {name: _with_table(layer, tables.get(name)) for name, layer in layers.items()}


def _with_table(layer: LayerState, params: QParams | None) -> LayerState:
    if params is None:
        return layer
    return replace(layer, act_scale=params.scale.cpu(), act_zero_point=params.zero_point.to(torch.int8).cpu())
