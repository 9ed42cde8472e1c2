"""TCAQ-DM (AAAI 2025, arXiv 2412.16700): timestep-channel adaptive post-training quantization, down to W4A4.

No code of the paper exists; its algorithm is known from readings of it. What they leave open is a setting here, with a default that was
chosen by measurement (quantization spec 5).
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.methods._shared import ROUNDING, STEPS, CalibrateConfig, Effort, RoundingConfig, rounding_settings
from qdm_cli.engine.spec import Bytes, Spec

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
    from qdm_cli.engine.quant.aligned import AlignedPlan, SampleTrajectories
    from qdm_cli.engine.quant.state import LayerDecision, QuantState


class ChannelConfig(Spec):
    """TCR: one factor per input channel, from channel maxima weighted by the magnitude of their steps."""

    alpha: float | None = Field(None, ge=0, le=1)
    """How much of the unevenness of a layer's input channels moves into its weight; 0 = none; null = the best of `grid` for each layer, by
    the error of its output."""
    grid: tuple[float, ...] = Field((0.0, 0.25, 0.5, 0.75, 1.0), min_length=1)
    """Candidates when `alpha` is null."""
    layers: Literal["conv", "all"] = "conv"
    """conv = convolutions (the paper); all = linear layers too."""
    fold: bool = True
    """Put factors into the norm before the layer where no nonlinearity and no other reader lies between; the others are multiplied at run
    time."""
    samples: int = Field(2, ge=1)
    """Inputs per step on which `grid` is judged."""


class StepConfig(Spec):
    """Activation step sizes; they are learnt with the rounding, in the same updates."""

    init: Literal["max", "mse"] = "mse"
    """Ranges to start from."""
    lr: float | None = Field(None, gt=0)
    """Rate of the logarithm of a step size, cosine to 0; null = by `effort` (1e-2, 5e-3 or 4e-4)."""


class AlignedConfig(Spec):
    """PAR: reconstruction again, on trajectories of the quantized model."""

    rounds: int = Field(1, ge=0)
    """Rounds; one that does not lower the held-out error is rejected. Not known of the paper."""
    samples: int = Field(32, ge=1)
    """Trajectories of the quantized model that a round learns from."""
    held_out: int = Field(8, ge=1)
    """Further trajectories that judge it."""
    share: float = Field(0.25, gt=0, le=1)
    """Updates per unit, as a share of those of the first reconstruction."""
    keep: float = Field(0.5, ge=0, le=1)
    """Share that the codes found so far have in the rounding to start from; the rest is the float weight."""


class SoftmaxConfig(Spec):
    """DAQ: probabilities of attention as powers of two or as multiples of a scale. Read where `quantize.attention` gives them at most 8
    bits."""

    adaptive: bool = True
    """Choose for each attention and step group; false = multiples of a scale everywhere."""
    by: Literal["error", "likelihood"] = "error"
    """error = the smaller error of the attention's output, measured; likelihood = powers of two where a power law fits the probabilities
    better than an exponential law, by maximum likelihood and by Kolmogorov-Smirnov distance."""
    groups: int = Field(1, ge=1)
    """Groups of consecutive denoising steps that choose apart. Not known of the paper."""
    renormalise: bool = True
    """Divide rows of powers of two by their sums, which drift to 1.02 to 1.05."""


class TcaqDmConfig(CalibrateConfig):
    """Factors per input channel, reconstruction on quantized inputs, rounds on the model's own trajectories.

    One activation scale for all steps unless the bit policy asks for more (`quantize.activations.timestep_aware`): the paper's number of
    step groups is unknown.
    """

    method: Literal["tcaqdm"] = "tcaqdm"
    effort: Effort = "balanced"
    """Iteration counts and rates that are not set explicitly; best = those of Q-Diffusion."""
    calibration_steps: int = Field(20, ge=1)
    """Denoising steps that reconstruction sees, evenly spaced over the trajectory; never more than it has."""
    batch_size: int = Field(32, ge=1)
    """Samples per update."""
    channels: ChannelConfig = ChannelConfig()
    """Factors of the input channels (TCR)."""
    rounding: RoundingConfig = RoundingConfig()
    """Rounding of the weights, learnt together with the step sizes on quantized inputs."""
    activations: StepConfig = StepConfig()
    """Step sizes of the activations."""
    bias_lr: float = Field(0.0, ge=0)
    """Rate of the biases, which are learnt with the rest, cosine to 0; 0 = they stay (nothing is known of the paper)."""
    softmax: SoftmaxConfig = SoftmaxConfig()
    """Probabilities of attention (DAQ)."""
    aligned: AlignedConfig = AlignedConfig()
    """Rounds on the quantized model's own trajectories (PAR)."""
    largest_error: float | None = Field(None, gt=0)
    """Exit 5 when the final predictions are off by more than this, relative to the sum of squares of the full-precision ones on the final
    model's own trajectories; null = no limit."""
    memory: Bytes = 2**30
    """Inputs and outputs of a unit that are held in memory; a larger set is streamed from disk."""

    def passes(self) -> tuple[int, ...]:
        """Both together, then every round."""
        updates = ROUNDING[self.effort][0] if self.rounding.iterations is None else self.rounding.iterations
        return (updates, *[max(1, round(self.aligned.share * updates))] * self.aligned.rounds)


@method(TcaqDmConfig)
def tcaqdm(
    denoiser: nn.Module,
    cfg: TcaqDmConfig,
    ctx: RunContext,
    *,
    decisions: list[LayerDecision],
    store: TrajectoryStore,
    sample: SampleTrajectories,
    **unused: Any,
) -> QuantState:
    """Choose the factors, reconstruct unit by unit, then align with the quantized model's own trajectories."""
    from qdm_cli.engine.quant.adaptive_softmax import SoftmaxSettings, with_adaptive_softmax
    from qdm_cli.engine.quant.aligned import reconstruct_aligned
    from qdm_cli.engine.quant.attention_ranges import with_attention

    state = reconstruct_aligned(denoiser, _plan(cfg, ctx), ctx, decisions=decisions, store=store, sample=sample)
    state = with_attention(state, denoiser, ctx.recipe.quantize, store, cfg.samples_per_step)
    if not (state.attention and cfg.softmax.adaptive):
        return state
    settings = SoftmaxSettings(cfg.softmax.by, cfg.softmax.groups, cfg.softmax.renormalise, cfg.samples_per_step)
    return with_adaptive_softmax(state, denoiser, store, settings, ctx)


def _plan(cfg: TcaqDmConfig, ctx: RunContext) -> AlignedPlan:
    from qdm_cli.engine.quant.aligned import AlignedPlan
    from qdm_cli.engine.quant.calibration import RangeRule
    from qdm_cli.engine.quant.channel_scales import FactorSettings
    from qdm_cli.engine.quant.fit_joint import JointSettings

    channels, aligned = cfg.channels, cfg.aligned
    rounding = rounding_settings(cfg.rounding, cfg.effort, cfg.batch_size, smoke=ctx.smoke)
    step_lr = cfg.activations.lr or STEPS[cfg.effort][1]
    alphas = channels.grid if channels.alpha is None else (channels.alpha,)
    return AlignedPlan(
        factors=FactorSettings(
            alphas=alphas[:2] if ctx.smoke else alphas,
            kinds=("Conv2d",) if channels.layers == "conv" else ("Conv2d", "Linear"),
            samples=channels.samples,
            memory=cfg.memory,
            weight_rule=RangeRule(ctx.recipe.quantize.weights.init or "mse"),
            activation_rule=RangeRule(cfg.activations.init),
        ),
        fold=channels.fold,
        activation_range=cfg.activations.init,
        calibration_steps=cfg.calibration_steps,
        samples_per_step=cfg.samples_per_step,
        memory=cfg.memory,
        joint=JointSettings(rounding, step_lr, cfg.bias_lr),
        aligned=JointSettings(
            replace(rounding, iterations=max(1, round(aligned.share * rounding.iterations))), step_lr, cfg.bias_lr, keep=aligned.keep
        ),
        rounds=min(1, aligned.rounds) if ctx.smoke else aligned.rounds,
        round_samples=min(2, aligned.samples) if ctx.smoke else aligned.samples,
        held_out=min(2, aligned.held_out) if ctx.smoke else aligned.held_out,
        largest_error=cfg.largest_error,
    )
