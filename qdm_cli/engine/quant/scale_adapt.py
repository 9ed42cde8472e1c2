"""Trains the scales of a quantized denoiser: what PEQA and TuneQDM share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.interval_config import IntervalSpec
from qdm_cli.engine.diffusion.intervals import clustered_keys, uniform_keys, unvisited
from qdm_cli.engine.diffusion.noising import NoiseSchedule
from qdm_cli.engine.diffusion.training_set import TrainingSet, joined
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.row_adam import RowAdam
from qdm_cli.engine.quant.scale_layers import ScaleTables, build_scaled_, start_scales, state_digest
from qdm_cli.engine.quant.scale_training import Adaptation, AdaptTrainer, predict
from qdm_cli.engine.quant.state import QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.scale_config import AdaptConfig


@dataclass(frozen=True)
class AdaptInputs:
    """What the stage makes of the recipe's images and pipeline.

    Attributes:
        data: images of the new domain.
        schedule: the forward process of the model.
        visited: timesteps of the deployment sampler.
        prior: makes the samples of prior preservation with the denoiser as it is then; None = none are wanted.
    """

    data: TrainingSet
    schedule: NoiseSchedule
    visited: list[float]
    prior: Callable[[], TrainingSet] | None = None


@dataclass(frozen=True)
class ScalePlan:
    """Which scales train.

    Attributes:
        method: for people.
        keys: f64 [n], smallest timestep of each interval.
        input_scales: with s_in.
        output_rate, input_rate: peak learning rates of the logarithms.
    """

    method: str
    keys: Tensor
    input_scales: bool
    output_rate: float
    input_rate: float


def adapt_scales(
    denoiser: nn.Module, cfg: AdaptConfig, ctx: RunContext, plan: ScalePlan, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train the scales of `plan` on images; integer weights, zero points, biases and norms stay as they are.

    Args:
        denoiser: changed in place; its float weights are given up before training starts.

    Returns:
        `state` with a scale set, and metrics: losses on fixed images before and after, trained parameters and their share.
    """
    floats = sum(p.numel() for p in denoiser.parameters())
    start = start_scales(state, denoiser, keys=plan.keys, input_scales=plan.input_scales, base=state_digest(state))
    tables, _ = build_scaled_(denoiser, state, start)
    warn_unvisited(plan.keys, inputs.visited, ctx)
    if cfg.gradient_checkpointing:
        enable_checkpointing_(denoiser)
    # made by the quantized model as it is before training
    prior = inputs.prior() if inputs.prior is not None else None
    job = Adaptation(denoiser, scale_optimizer(tables, plan), inputs.data, inputs.schedule, prior, "finetune.lr")
    metrics = AdaptTrainer(job, cfg, ctx).train()
    trained = sum(p.numel() for p in job.parameters())
    about = {"method": plan.method, "model": ctx.recipe.model.id, "updates": metrics["updates"]}
    found = replace(start, layers=tables.layers(), about=about)
    return replace(state, scales=found), metrics | {"trained_parameters": trained, "trained_share": trained / floats}


def scale_optimizer(tables: ScaleTables, plan: ScalePlan) -> RowAdam:
    """Adam on the logarithms, without decay; an interval that is not in the batch stays as it is."""
    tables.delta_out.requires_grad_(True)
    groups: list[dict[str, Any]] = [{"params": [tables.delta_out], "lr": plan.output_rate}]
    if tables.delta_in is not None and plan.input_scales:
        tables.delta_in.requires_grad_(True)
        groups.append({"params": [tables.delta_in], "lr": plan.input_rate})
    return RowAdam(groups, lr=plan.output_rate)


def interval_keys(spec: IntervalSpec, denoiser: nn.Module, inputs: AdaptInputs, ctx: RunContext) -> Tensor:
    """Smallest timestep of each interval that the recipe asks for.

    Raises:
        InputError: more intervals than the sampler has steps.
    """
    steps = len(inputs.visited)
    if spec.k > steps:
        message = f"{spec.k} intervals, but the sampler has {steps} steps: some would never be used"
        raise InputError(f"finetune.intervals.k: {message}", path="finetune.intervals.k")
    if spec.method == "uniform":
        return uniform_keys(spec.k, inputs.schedule.end)
    seed, data = ctx.recipe.seed, inputs.data
    model = model_estimate(denoiser, inputs) if spec.method == "model_x0" else None
    return clustered_keys(spec, inputs.schedule, data.x0, model, seed)


def model_estimate(denoiser: nn.Module, inputs: AdaptInputs, batch: int = 16) -> Callable[[Tensor, Tensor], Tensor]:
    """x_0 as the denoiser predicts it, for the first images of the training set in order."""
    schedule, data = inputs.schedule, inputs.data

    @torch.no_grad()
    def estimate(x_t: Tensor, index: Tensor) -> Tensor:
        parts = []
        for first in range(0, len(x_t), batch):
            part = slice(first, first + batch)
            condition = joined([data.conditions[which] for which in data.which[part]][: len(x_t[part])])
            predicted = predict(denoiser, data.sample_name, x_t[part], schedule.times[index[part]], condition).float().cpu()
            parts.append(schedule.estimate(x_t[part], predicted, index[part]))
        return torch.cat(parts)

    return estimate


def warn_unvisited(keys: Tensor, visited: list[float], ctx: RunContext) -> None:
    """Say which intervals the deployment sampler never uses."""
    missed = unvisited(keys, visited)
    if missed:
        which = f"{len(missed)} of {len(keys)} time-step intervals"
        ctx.warn(f"The sampler of {len(visited)} steps never visits {which}: {', '.join(missed)}. Their scales are trained for nothing.")


def enable_checkpointing_(denoiser: nn.Module) -> None:
    """
    Raises:
        InputError: the model has no gradient checkpointing.
    """
    enable = getattr(denoiser, "enable_gradient_checkpointing", None)
    if enable is None:
        raise InputError(f"finetune.gradient_checkpointing: {type(denoiser).__name__} has none; set it to false")
    enable()
    # diffusers checkpoints only in training mode; without dropout that changes nothing else
    denoiser.train()
