"""Settings that every calibration method has. Methods do not import each other: what they share lies here."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdm_cli.engine.quant.config import Bits
from qdm_cli.engine.spec import Bytes, Spec


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
    sensitivity: Literal["off", "fast", "end_to_end"] = "off"
    """Errors of every layer at several widths as sensitivity.json and sensitivity.html. fast = of weight and output, one pass over a few
    captured calls per width; end_to_end = also of the final image, which samples once per layer and width."""
    sensitivity_bits: tuple[Bits, ...] = Field((2, 3, 4, 5, 6, 8), min_length=1)
    """Widths to measure; `quantize.auto` chooses among them."""
    sensitivity_samples: int = Field(8, ge=1)
    """Inputs per timestep of the layers' errors, and images of the final error."""
