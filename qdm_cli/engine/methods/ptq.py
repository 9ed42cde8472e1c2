"""Plain post-training quantization: the honest baseline of every other method (quantization spec 1.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.spec import Bytes, Spec

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.state import QuantState


class CalibrationData(Spec):
    """What the full-precision pipeline is run on to make trajectories."""

    prompts: str = "builtin:captions-128"
    """`builtin:captions-128`, or a .txt file with one prompt per line; unused by pipelines without text."""
    samples: int = Field(64, ge=1)
    """Trajectories to generate; every denoising step of each is captured."""
    batch: int = Field(16, ge=1)
    """Trajectories generated at a time."""
    shard_size: Bytes = 64 * 2**20
    """Size at which a shard of the trajectory store is closed and flushed to disk."""


class CalibrateConfig(Spec):
    """Fields that every calibration method has."""

    data: CalibrationData = CalibrationData()
    """Trajectories of the full-precision model."""
    samples_per_step: int = Field(32, ge=1)
    """Inputs per denoising step that ranges are measured on."""


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
def post_training(denoiser: nn.Module, cfg: CalibrateConfig, ctx: RunContext, **inputs: Any) -> QuantState:
    """Initialise every weight and activation range of a converted denoiser from its calibration trajectories."""
    from qdm_cli.engine.quant.calibration import initialise_ranges

    return initialise_ranges(denoiser, cfg, ctx, **inputs)
