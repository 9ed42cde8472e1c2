"""Plain post-training quantization: the honest baseline of every other method (quantization spec 1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.methods._shared import CalibrateConfig

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
    from qdm_cli.engine.quant.state import LayerDecision, QuantState


class MinMaxConfig(CalibrateConfig):
    """Ranges from the smallest and largest value."""

    method: Literal["minmax"] = "minmax"


class MseConfig(CalibrateConfig):
    """Ranges that minimise the mean of |x - x_hat|^2.4 over 80 shrink factors."""

    method: Literal["mse"] = "mse"


class PercentileConfig(CalibrateConfig):
    """Ranges that cut off the largest values."""

    method: Literal["percentile"] = "percentile"
    percentile: float = Field(99.99, gt=50, le=100)
    """Share of the values inside the range, in percent; two-sided."""


@method(MinMaxConfig)
@method(MseConfig)
@method(PercentileConfig)
def post_training(
    denoiser: nn.Module, cfg: CalibrateConfig, ctx: RunContext, *, decisions: list[LayerDecision], store: TrajectoryStore, **unused: Any
) -> QuantState:
    """Initialise every weight and activation range of a converted denoiser from its calibration trajectories."""
    from qdm_cli.engine.quant.calibration import initialise_ranges

    return initialise_ranges(denoiser, cfg, ctx, decisions=decisions, store=store)
