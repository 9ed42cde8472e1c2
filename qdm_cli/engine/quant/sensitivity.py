"""How much each layer minds few bits: the table `sensitivity.json` as data (interface spec 7). Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_cli.engine.errors import InputError

SENSITIVITY_FILE = "sensitivity.json"
SENSITIVITY_PAGE = "sensitivity.html"
SCHEMA = 1
NO_TABLE = (
    "needs a sensitivity table: set calibrate.sensitivity to fast or end_to_end (qdm calibrate RECIPE calibrate.sensitivity=fast), "
    "or name one by quantize.auto.table"
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class WidthErrors(_Part):
    """Errors of one layer at one width, everything else in full precision."""

    bits: int
    """Bits of a code."""
    weight_mse: float
    """Mean squared error of the weight."""
    weight_sqnr_db: float
    """Signal to quantization noise of the weight, at most 200."""
    output_error: float | None = None
    """Relative L2 error of the layer's output with the weight at this width; null = the trajectories never reached the layer."""
    output_mse: float | None = None
    """Mean squared error of that output."""
    activation_error: float | None = None
    """Relative L2 error of the layer's output with the input at this width, one min-max range per step."""
    image_error: float | None = None
    """Relative L2 error of the final latent (image of pixel-space models) with the weight at this width; null = not measured."""
    image_mse: float | None = None
    """Mean squared error of the final latent."""


class LayerErrors(_Part):
    """One Linear or Conv2d."""

    name: str
    """Module path inside the denoiser."""
    type: Literal["Linear", "Conv2d"]
    """Class."""
    shape: tuple[int, ...]
    """Weight shape."""
    role: str
    """Role in the graph."""
    bits_w: int | None = None
    """Bits that the policy gives its weight; null = it stays in full precision."""
    input_ranges: list[tuple[float, float]] = []
    """Smallest and largest input at each measured timestep."""
    widths: list[WidthErrors]
    """Errors by width, fewest bits first."""

    def at(self, bits: int) -> WidthErrors | None:
        """Errors at a width; None = not measured."""
        return next((entry for entry in self.widths if entry.bits == bits), None)


class Sensitivity(_Part):
    """`sensitivity.json`."""

    schema_: int = Field(SCHEMA, alias="schema")
    """Version of this format."""
    method: Literal["fast", "end_to_end"]
    """fast = layer by layer on captured inputs; end_to_end = also the final latent, one layer quantized at a time."""
    model: str
    """Digest of the base model."""
    sampler: dict[str, Any]
    """Sampler of the trajectories."""
    init: str
    """How ranges were chosen: max, mse or percentile."""
    timesteps: list[float]
    """Timesteps at which inputs were captured."""
    samples: int
    """Inputs per timestep, and trajectories of the final latent."""
    layers: list[LayerErrors]
    """Every Linear and Conv2d, in module order."""
    rules: list[dict[str, Any]] = []
    """What `quantize.auto` decided, as `quantize.rules` of a recipe; empty = it was not asked."""


def read_sensitivity(path: str | Path) -> Sensitivity:
    """Read `sensitivity.json`, or the one in an artifact's folder.

    Raises:
        InputError: no such file, or not such a table.
    """
    path = Path(path).expanduser()
    path = path / SENSITIVITY_FILE if path.is_dir() else path
    try:
        return Sensitivity.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", path="quantize.auto.table") from None
    except (ValidationError, ValueError):
        raise InputError(f"{path} is no {SENSITIVITY_FILE} of qdm calibrate", path="quantize.auto.table") from None
