"""TuneQDM (Ryu et al., ECCV 2024, arXiv 2401.04339): personalise a quantized model by scales per channel and time-step interval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qdm_cli.engine.diffusion.interval_config import IntervalSpec
from qdm_cli.engine.methods import method
from qdm_cli.engine.quant.scale_config import AdaptConfig
from qdm_cli.engine.spec import Spec

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.scale_adapt import AdaptInputs
    from qdm_cli.engine.quant.state import QuantState


class ScaleRates(Spec):
    """Peak learning rates of the logarithms of the scales: relative changes per update, whatever the bits."""

    output_scale: float = Field(1e-2, gt=0)
    """Rate of s_out."""
    input_scale: float = Field(1e-2, gt=0)
    """Rate of s_in."""


class TuneQdmConfig(AdaptConfig):
    """Multi-channel-wise scales W = s_out (W_q - z) s_in, with experts per time-step interval on one integer weight."""

    method: Literal["tuneqdm"] = "tuneqdm"
    intervals: IntervalSpec = IntervalSpec()
    """Time-step intervals, each with scales of its own; k: 1 = the same scales for all timesteps."""
    lr: ScaleRates = ScaleRates()
    """Learning rates."""


@method(TuneQdmConfig)
def tuneqdm(
    denoiser: nn.Module, cfg: TuneQdmConfig, ctx: RunContext, *, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train s_out and s_in of every quantized layer and interval; returns the state with its scale set, and metrics."""
    from qdm_cli.engine.quant.scale_adapt import ScalePlan, adapt_scales, interval_keys

    keys = interval_keys(cfg.intervals, denoiser, inputs, ctx)
    plan = ScalePlan("tuneqdm", keys, input_scales=True, output_rate=cfg.lr.output_scale, input_rate=cfg.lr.input_scale)
    return adapt_scales(denoiser, cfg, ctx, plan, state, inputs)
