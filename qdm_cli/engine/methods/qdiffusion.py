"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304): block reconstruction on timestep-aware calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.methods._shared import CalibrateConfig
from qdm_cli.engine.spec import Bytes, Spec

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
    from qdm_cli.engine.quant.state import LayerDecision, QuantState

Effort = Literal["fast", "balanced", "best"]
ROUNDING: dict[str, tuple[int, float]] = {"fast": (300, 3e-2), "balanced": (1000, 1e-2), "best": (20000, 1e-3)}
STEPS: dict[str, tuple[int, float]] = {"fast": (100, 1e-2), "balanced": (400, 5e-3), "best": (5000, 4e-4)}


class RoundingConfig(Spec):
    """AdaRound of the weights of a unit (section 3.2 of the paper)."""

    iterations: int | None = Field(None, ge=0)
    """Updates per unit; null = by `effort` (300, 1,000 or the paper's 20,000)."""
    lr: float | None = Field(None, gt=0)
    """Rate of Adam; null = by `effort` (3e-2, 1e-2 or the paper's 1e-3)."""
    penalty: float = Field(0.01, ge=0)
    """Weight of the regulariser that makes every weight decide."""
    warmup: float = Field(0.2, ge=0, lt=1)
    """Share of the updates before the regulariser sets in."""
    max_bits: int = Field(8, ge=2, le=8)
    """Units whose weights all have more bits are rounded to nearest: at 8 bits the gain is below 1e-4 of the output."""


class StepSizeConfig(Spec):
    """Activation step sizes, after the weights."""

    init: Literal["max", "mse", "running"] = "mse"
    """Ranges to start from. running = moving average of smallest and largest value (momentum 0.95) over all calibration data."""
    iterations: int | None = Field(None, ge=0)
    """LSQ updates per unit; null = by `effort` (100, 400 or the paper's 5,000); 0 = keep the initial ranges."""
    lr: float | None = Field(None, gt=0)
    """Rate of the logarithm of a step size, cosine to 0; null = by `effort` (1e-2, 5e-3 or 4e-4)."""
    exponent: float = Field(2.4, gt=0)
    """Exponent of the output error."""


class QDiffusionConfig(CalibrateConfig):
    """AdaRound and LSQ, block by block, on evenly spaced denoising steps; `samples_per_step` inputs of each are used."""

    method: Literal["qdiffusion"] = "qdiffusion"
    effort: Effort = "balanced"
    """Iteration counts and rates that are not set explicitly; best = those of the paper."""
    calibration_steps: int = Field(20, ge=1)
    """Denoising steps that reconstruction sees, evenly spaced over the trajectory; never more than it has."""
    batch_size: int = Field(32, ge=1)
    """Samples per update."""
    rounding: RoundingConfig = RoundingConfig()
    """Rounding of the weights."""
    activations: StepSizeConfig = StepSizeConfig()
    """Step sizes of the activations."""
    memory: Bytes = 2**30
    """Inputs and outputs of a unit that are held in memory; a larger set is streamed from disk."""


@method(QDiffusionConfig)
def qdiffusion(
    denoiser: nn.Module, cfg: QDiffusionConfig, ctx: RunContext, *, decisions: list[LayerDecision], store: TrajectoryStore
) -> QuantState:
    """Learn the rounding of every weight, then every activation step size, unit by unit in execution order."""
    from qdm_cli.engine.quant.fit_rounding import RoundingSettings
    from qdm_cli.engine.quant.fit_steps import StepSettings
    from qdm_cli.engine.quant.reconstruct import Plan, reconstruct

    rounding, steps = cfg.rounding, cfg.activations
    iterations, lr = ROUNDING[cfg.effort]
    step_iterations, step_lr = STEPS[cfg.effort]
    limit = 4 if ctx.smoke else 10**9
    plan = Plan(
        weight_range=ctx.recipe.quantize.weights.init or "mse",
        activation_range=steps.init,
        calibration_steps=cfg.calibration_steps,
        samples_per_step=cfg.samples_per_step,
        memory=cfg.memory,
        rounding=RoundingSettings(
            iterations=min(limit, iterations if rounding.iterations is None else rounding.iterations),
            batch=min(limit, cfg.batch_size),
            lr=rounding.lr or lr,
            penalty=rounding.penalty,
            warmup=rounding.warmup,
            max_bits=rounding.max_bits,
        ),
        steps=StepSettings(
            iterations=min(limit, step_iterations if steps.iterations is None else steps.iterations),
            batch=min(limit, cfg.batch_size),
            lr=steps.lr or step_lr,
            exponent=steps.exponent,
        ),
    )
    return reconstruct(denoiser, plan, ctx, decisions=decisions, store=store)
