"""Settings that calibration methods share: those of all, and those of reconstruction. Methods do not import each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qdm_cli.engine.diffusion.interval_config import IntervalSpec
from qdm_cli.engine.quant.config import Bits
from qdm_cli.engine.spec import Bytes, Spec

if TYPE_CHECKING:
    from qdm_cli.engine.quant.fit_rounding import RoundingSettings
    from qdm_cli.engine.quant.fit_steps import StepSettings


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
    timestep_groups: IntervalSpec | None = None
    """Activation scales per group of timesteps instead of one per step, for timestep-aware activations; null = one per step."""
    sensitivity: Literal["off", "fast", "end_to_end"] = "off"
    """Errors of every layer at several widths as sensitivity.json and sensitivity.html. fast = of weight and output, one pass over a few
    captured calls per width; end_to_end = also of the final image, which samples once per layer and width."""
    sensitivity_bits: tuple[Bits, ...] = Field((2, 3, 4, 5, 6, 8), min_length=1)
    """Widths to measure; `quantize.auto` chooses among them."""
    sensitivity_samples: int = Field(8, ge=1)
    """Inputs per timestep of the layers' errors, and images of the final error."""

    def passes(self) -> tuple[int, ...]:
        """Updates per unit of every pass over the units, for plans; empty = nothing is reconstructed."""
        return ()


Effort = Literal["fast", "balanced", "best"]
SMOKE_UPDATES = 4
ROUNDING: dict[str, tuple[int, float]] = {"fast": (300, 6e-2), "balanced": (1000, 1e-2), "best": (20000, 1e-3)}
STEPS: dict[str, tuple[int, float]] = {"fast": (100, 1e-2), "balanced": (400, 5e-3), "best": (5000, 4e-4)}


class RoundingConfig(Spec):
    """AdaRound of the weights of a unit (section 3.2 of the paper)."""

    iterations: int | None = Field(None, ge=0)
    """Updates per unit; null = by `effort` (300, 1,000 or the paper's 20,000)."""
    lr: float | None = Field(None, gt=0)
    """Rate of Adam; null = by `effort` (6e-2, 1e-2 or the paper's 1e-3)."""
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


def rounding_settings(cfg: RoundingConfig, effort: Effort, batch: int, *, smoke: bool) -> RoundingSettings:
    """Resolved: what is not set follows `effort`."""
    from qdm_cli.engine.quant.fit_rounding import RoundingSettings

    iterations, lr = ROUNDING[effort]
    wanted = iterations if cfg.iterations is None else cfg.iterations
    return RoundingSettings(
        iterations=min(SMOKE_UPDATES, wanted) if smoke else wanted,
        batch=min(SMOKE_UPDATES, batch) if smoke else batch,
        lr=cfg.lr or lr,
        penalty=cfg.penalty,
        warmup=cfg.warmup,
        max_bits=cfg.max_bits,
    )


def step_settings(cfg: StepSizeConfig, effort: Effort, batch: int, *, smoke: bool) -> StepSettings:
    """Resolved: what is not set follows `effort`."""
    from qdm_cli.engine.quant.fit_steps import StepSettings

    iterations, lr = STEPS[effort]
    wanted = iterations if cfg.iterations is None else cfg.iterations
    return StepSettings(
        iterations=min(SMOKE_UPDATES, wanted) if smoke else wanted,
        batch=min(SMOKE_UPDATES, batch) if smoke else batch,
        lr=cfg.lr or lr,
        exponent=cfg.exponent,
    )
