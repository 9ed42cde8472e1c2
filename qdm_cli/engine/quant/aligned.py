"""Progressively aligned reconstruction (PAR; TCAQ-DM, AAAI 2025, arXiv 2412.16700): reconstruct, sample with the result, and again.

A quantized model drifts from the trajectories that it was calibrated on. Every round takes the x_t that the model so far makes by itself,
with the full-precision outputs at those x_t as targets, and is kept only if it lowers the error on held-out trajectories of the same kind.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import Arguments, TrajectoryStore
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import RangeRule, activation_tables, code_layer, run_denoiser
from qdm_cli.engine.quant.channel_scales import FactorSettings, choose_factors
from qdm_cli.engine.quant.fit_joint import JointFit, JointSettings
from qdm_cli.engine.quant.fold_norms import folded_parameters, norms_before
from qdm_cli.engine.quant.grid import RangeMethod
from qdm_cli.engine.quant.reconstruction import CalibrationCalls, Pair, evenly_spaced, run_units, write_report
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState
from qdm_cli.engine.quant.state_apply import apply_state_, load_floats_

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

SampleTrajectories = Callable[..., TrajectoryStore]
"""(denoiser, folder, *, first, samples): trajectories that `denoiser` makes in the pipeline, from noise number `first` on."""
Report = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class AlignedPlan:
    """Everything that the method is told, resolved.

    Attributes:
        factors: of the input channels.
        fold: put them into a preceding norm where nothing else reads it.
        activation_range: how step sizes start.
        calibration_steps, samples_per_step: which captured calls are used.
        memory: bytes of unit data held at a time.
        joint, aligned: the reconstruction on full-precision trajectories, and that of a round.
        rounds: 0 = none.
        round_samples, held_out: trajectories of the quantized model that a round learns from, and that judge it.
        largest_error: relative error of the prediction on held-out trajectories above which the model counts as broken; None = no limit.
    """

    factors: FactorSettings
    fold: bool
    activation_range: RangeMethod
    calibration_steps: int
    samples_per_step: int
    memory: int
    joint: JointSettings
    aligned: JointSettings
    rounds: int
    round_samples: int
    held_out: int
    largest_error: float | None


def reconstruct_aligned(
    denoiser: nn.Module,
    plan: AlignedPlan,
    ctx: RunContext,
    *,
    decisions: list[LayerDecision],
    store: TrajectoryStore,
    sample: SampleTrajectories,
) -> QuantState:
    """Quantize a denoiser: factors of the channels, reconstruction, then rounds on its own trajectories.

    Args:
        denoiser: the full-precision model, left as it was.

    Raises:
        GateFailed: NaN or infinity, a layer that is never reached, or an error above `largest_error`.
    """
    denoiser.eval()  # dropout would make ranges and targets random
    chosen = {d.name: d for d in decisions if d.skipped_why is None}
    calls = CalibrationCalls(store, evenly_spaced(store.timesteps(), plan.calibration_steps), plan.samples_per_step)
    report: Report = {}
    start = start_state(denoiser, chosen, plan, ctx, calls, report)
    keys = torch.tensor(store.timesteps() if any(d.timestep_aware for d in chosen.values()) else [0.0], dtype=torch.float64)
    state = replace(start, skipped=tuple(d for d in decisions if d.skipped_why), step_keys=keys)
    state = with_ranges(denoiser, state, plan, ctx, store)
    state = reconstructed(denoiser, state, calls, plan.joint, "joint", plan.memory, ctx, report)
    for index in range(plan.rounds):
        state = aligned_round(denoiser, state, plan, ctx, sample, index, report)
    write_report(ctx, report)
    if plan.largest_error is not None:
        check_error(denoiser, state, plan, ctx, sample, report)
    return state


def start_state(
    denoiser: nn.Module, chosen: dict[str, LayerDecision], plan: AlignedPlan, ctx: RunContext, calls: CalibrationCalls, report: Report
) -> QuantState:
    """Weights rounded to nearest after their channels have factors; one resumable file of factors."""
    path = ctx.resume / "factors.safetensors"
    if not path.exists():
        ctx.events.log(f"factors of the input channels: {len(plan.factors.alphas)} strengths per layer")
        factors, figures = choose_factors(denoiser, chosen, plan.factors, list(calls))
        norms = norms_before(denoiser, factors, lambda: run_denoiser(denoiser, next(iter(calls)))) if plan.fold else {}
        write_tensors(path, factors, {"figures": figures, "norms": norms})
    factors, meta = read_tensors(path)
    report["factors"] = [{"layer": name, **figure} for name, figure in meta["figures"].items()]
    layers: dict[str, LayerState] = {}
    floats: dict[str, torch.Tensor] = {}
    for name, decision in chosen.items():
        norm = meta["norms"].get(name)
        own = replace(decision, pre_scale=name in factors and norm is None, folded_into=norm)
        layers[name] = code_layer(denoiser.get_submodule(name), own, plan.factors.weight_rule, None, factors.get(name)).cpu()
    for name, norm in meta["norms"].items():
        floats |= folded_parameters(denoiser.get_submodule(norm), norm, factors[name])
    return QuantState(layers=layers, floats=floats)


def with_ranges(denoiser: nn.Module, state: QuantState, plan: AlignedPlan, ctx: RunContext, store: TrajectoryStore) -> QuantState:
    """Activation ranges measured on the model whose weights are quantized."""
    chosen = {name: layer.decision for name, layer in state.layers.items()}
    floating = {name: replace(layer, decision=replace(layer.decision, bits_a=None)) for name, layer in state.layers.items()}
    student = student_of(denoiser, replace(state, layers=floating))
    tables = activation_tables(student, chosen, store, RangeRule(plan.activation_range), plan.samples_per_step, ctx)
    layers: dict[str, LayerState] = {}
    for name, layer in state.layers.items():
        params = tables.get(name)
        if params is not None:
            layer = replace(layer, act_scale=params.scale.cpu(), act_zero_point=params.zero_point.to(torch.int8).cpu())
        layers[name] = layer
    return replace(state, layers=layers)


def student_of(denoiser: nn.Module, state: QuantState) -> nn.Module:
    """A quantized copy in eval mode; untouched parameters are shared."""
    student = copy.deepcopy(denoiser, memo={id(parameter): parameter for parameter in denoiser.parameters()}).eval()
    apply_state_(student, state)
    return student


def reconstructed(
    denoiser: nn.Module,
    state: QuantState,
    calls: CalibrationCalls,
    settings: JointSettings,
    phase: str,
    memory: int,
    ctx: RunContext,
    report: Report,
) -> QuantState:
    """Rounding and step sizes learnt unit by unit on `calls`."""
    pair = Pair.of(denoiser, calls, StepContext(state.step_keys))
    load_floats_(pair.student, state.floats)
    fit = JointFit(pair, state.layers, settings, ctx.recipe.seed)
    report[phase] = run_units(phase, pair.units(list(state.layers)), pair, fit, memory=memory, ctx=ctx)
    return replace(state, layers={name: fit.layers[name] for name in state.layers})


def aligned_round(
    denoiser: nn.Module, state: QuantState, plan: AlignedPlan, ctx: RunContext, sample: SampleTrajectories, index: int, report: Report
) -> QuantState:
    """One round; the state as it was where the round does not lower the held-out error."""
    phase = f"round-{index}"
    path = ctx.resume / f"{phase}.safetensors"
    learn, judge = own_stores(denoiser, state, plan, ctx, sample, index)
    calls = CalibrationCalls(learn, evenly_spaced(learn.timesteps(), plan.calibration_steps), plan.samples_per_step)
    new = reconstructed(denoiser, state, calls, plan.aligned, phase, plan.memory, ctx, report)
    if not path.exists():
        errors = [prediction_error(denoiser, candidate, stored_calls(judge)) for candidate in (state, new)]
        write_tensors(path, {"errors": torch.tensor(errors, dtype=torch.float64)})
    before, after = read_tensors(path)[0]["errors"].tolist()
    kept = after < before  # false for NaN
    report.setdefault("rounds", []).append({"round": index, "held_out_before": before, "held_out": after, "kept": kept})
    ctx.events.log(f"round {index + 1}: error on held-out trajectories {before:.4g} -> {after:.4g}, {'kept' if kept else 'rejected'}")
    return new if kept else state


def own_stores(
    denoiser: nn.Module, state: QuantState, plan: AlignedPlan, ctx: RunContext, sample: SampleTrajectories, index: int
) -> tuple[TrajectoryStore, TrajectoryStore]:
    """Trajectories of the quantized model to learn from, and others to judge by; the noise of every round is new."""
    student = student_of(denoiser, state)
    first = (index + 1) * 100_000
    learn = sample(student, ctx.resume / f"own-{index}", first=first, samples=plan.round_samples)
    return learn, sample(student, ctx.resume / f"held-out-{index}", first=first + plan.round_samples, samples=plan.held_out)


def stored_calls(store: TrajectoryStore) -> Iterable[Arguments]:
    """All captured calls."""
    return (store.arguments(record) for record in store.records)


def prediction_error(denoiser: nn.Module, state: QuantState, calls: Iterable[Arguments]) -> float:
    """sum (e_q - e_fp)^2 / sum e_fp^2 over the predictions of both models at the same inputs."""
    student = student_of(denoiser, state)
    error = signal = 0.0
    for arguments in calls:
        want = run_denoiser(denoiser, arguments).double()
        error += float((run_denoiser(student, arguments).double() - want).square().sum())
        signal += float(want.square().sum())
    return error / max(signal, 1e-30)


def check_error(
    denoiser: nn.Module, state: QuantState, plan: AlignedPlan, ctx: RunContext, sample: SampleTrajectories, report: Report
) -> None:
    """
    Raises:
        GateFailed: the error on trajectories of the final model is above `largest_error`; names the first unit that is as far off.
    """
    _, judge = own_stores(denoiser, state, replace(plan, round_samples=1), ctx, sample, plan.rounds)
    error = prediction_error(denoiser, state, stored_calls(judge))
    limit = plan.largest_error
    if limit is None or error <= limit:
        return
    units = report["joint"]
    worst = next((row for row in units if not row["error"] <= limit), max(units, key=lambda row: row["error"], default=None))
    where = "" if worst is None else f" The first unit that is off is {worst['unit']} (relative error {worst['error']:.3g})."
    raise GateFailed(f"The quantized model's predictions are off by {error:.3g} (limit {limit:g}).{where} Use more bits.")
