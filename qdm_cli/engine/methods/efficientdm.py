"""EfficientDM (He et al., ICLR 2024, arXiv 2310.03270): quantization-aware low-rank fine-tuning without training data."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.distillation import Trajectories
    from qdm_cli.engine.quant.state import QuantState


class TrainSampler(Spec):
    """Sampler whose full-precision trajectories are distilled; the recipe's `sampler` is the one of deployment."""

    steps: int | None = Field(None, ge=1)
    """Denoising steps; null = those of `sampler`."""
    eta: float | None = Field(None, ge=0, le=1)
    """DDIM noise; null = that of `sampler`."""
    guidance: float | None = None
    """Guidance scale; null = that of `sampler`."""


class LearningRates(Spec):
    """Peak learning rates; all decay linearly to 0."""

    adapter_divisor: float = Field(2500.0, gt=0)
    """LoRA rate of a layer = mean weight scale of the layer / this (scale-aware form of Eq. 8)."""
    weight_scale: float = Field(1e-6, ge=0)
    """Absolute rate of the weight scales."""
    activation_scale: float = Field(5e-3, ge=0)
    """Rate of the logarithm of the activation scales; zero points take five times that, in code units."""
    floats: float = Field(1e-4, ge=0)
    """Rate of biases and norms, when they train."""


class EfficientDMConfig(Spec):
    """QALoRA (Eq. 6), data-free distillation (Eq. 7), scale-aware rates (Eq. 8), temporal activation scales (Eq. 9)."""

    method: Literal["efficientdm"] = "efficientdm"
    iterations: int = Field(16000, ge=1)
    """Optimizer updates."""
    batch_size: int = Field(4, ge=1)
    """Trajectories distilled at a time."""
    accumulate: int = Field(1, ge=1)
    """Batches per update."""
    rank: int = Field(32, ge=1)
    """Rank of the low-rank update; capped at the smaller side of each layer."""
    base: Literal["fp", "int"] = "fp"
    """What the update is added to: the full-precision weight, or its dequantized integer codes."""
    order: Literal["trajectory", "shuffled"] = "trajectory"
    """trajectory = every update sees one timestep, in sampling order (the paper); shuffled = the timesteps of `batch_size` trajectories
    are mixed over as many updates."""
    sampler: TrainSampler = TrainSampler()
    """Training trajectories; steps that the deployment sampler does not visit get rows of their own."""
    rows: Literal["nearest", "linear"] = "nearest"
    """How activation scales are read at a timestep that has no row."""
    lr: LearningRates = LearningRates()
    """Learning rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of the adapters; scales and zero points have none."""
    train_bias: bool = False
    """Also train biases (not in the paper; off reproduces it)."""
    train_norm: bool = False
    """Also train the affine parameters of norms (not in the paper; off reproduces it)."""
    ema: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the trained parameters, which is then exported; null = none."""
    precision: Literal["float32", "bfloat16", "float16"] = "float32"
    """Autocast type of the training forward."""
    clip: float | None = Field(None, gt=0)
    """Gradient-norm clip of adapters and weight scales; null = none."""
    checkpoint_every: int = Field(200, ge=1)
    """Updates between resumable checkpoints."""
    log: tuple[Literal["tensorboard"], ...] = ()
    """Further loggers."""
    diverge_factor: float = Field(10.0, gt=1)
    """Abort (exit 5) when the mean loss of one trajectory exceeds this many times that of the first."""


@method(EfficientDMConfig)
def efficientdm(
    denoiser: nn.Module, cfg: EfficientDMConfig, ctx: RunContext, *, state: QuantState, trajectories: Trajectories
) -> tuple[QuantState, dict[str, float]]:
    """Train adapters, weight scales and per-step activation scales of a calibrated denoiser along full-precision trajectories.

    Returns:
        The integer state with the adapters merged, and first and last loss.
    """
    from qdm_cli.engine.diffusion.trajectories import timestep_of
    from qdm_cli.engine.quant.distillation import distill
    from qdm_cli.engine.quant.qalora import build_student, with_rows

    timesteps = sorted({timestep_of(arguments) for arguments, _ in trajectories.run(0)})
    # groups of timesteps hold for every sampler: they stay as calibration made them
    grouped = state.row_mode == "interval"
    start = state if grouped else dataclasses.replace(with_rows(state, timesteps), row_mode=cfg.rows)
    student = build_student(
        denoiser, start, rank=cfg.rank, base=cfg.base, train_bias=cfg.train_bias, train_norm=cfg.train_norm, seed=ctx.recipe.seed
    )
    metrics = distill(student, trajectories, cfg, ctx)
    return student.state(), metrics
