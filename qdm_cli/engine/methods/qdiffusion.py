"""Q-Diffusion (Li et al., ICCV 2023, arXiv 2302.04304): block reconstruction on timestep-aware calibration data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.methods._shared import (
    ROUNDING,
    STEPS,
    CalibrateConfig,
    Effort,
    RoundingConfig,
    StepSizeConfig,
    rounding_settings,
    step_settings,
)
from qdm_cli.engine.spec import Bytes

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
    from qdm_cli.engine.quant.state import LayerDecision, QuantState


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

    def passes(self) -> tuple[int, ...]:
        """Weights, then step sizes."""
        rounding, steps = self.rounding.iterations, self.activations.iterations
        found = (ROUNDING[self.effort][0] if rounding is None else rounding, STEPS[self.effort][0] if steps is None else steps)
        return tuple(updates for updates in found if updates)


@method(QDiffusionConfig)
def qdiffusion(
    denoiser: nn.Module, cfg: QDiffusionConfig, ctx: RunContext, *, decisions: list[LayerDecision], store: TrajectoryStore, **unused: Any
) -> QuantState:
    """Learn the rounding of every weight, then every activation step size, unit by unit in execution order."""
    from qdm_cli.engine.quant.reconstruct import Plan, reconstruct

    plan = Plan(
        weight_range=ctx.recipe.quantize.weights.init or "mse",
        activation_range=cfg.activations.init,
        calibration_steps=cfg.calibration_steps,
        samples_per_step=cfg.samples_per_step,
        memory=cfg.memory,
        rounding=rounding_settings(cfg.rounding, cfg.effort, cfg.batch_size, smoke=ctx.smoke),
        steps=step_settings(cfg.activations, cfg.effort, cfg.batch_size, smoke=ctx.smoke),
    )
    return reconstruct(denoiser, plan, ctx, decisions=decisions, store=store)
