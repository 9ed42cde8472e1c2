"""metrics.json: what an evaluation found. Imports neither torch nor diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.names import METRICS

METRICS_FILE = "metrics.json"
SCHEMA = 1


class Evaluation(BaseModel):
    """`metrics.json`."""

    model_config = ConfigDict(extra="ignore", use_attribute_docstrings=True)

    schema_: int = Field(SCHEMA, alias="schema")
    """Version of this format."""
    subject: dict[str, Any]
    """name, kind (base, simulated, exported) and digest of the model under test."""
    reference: dict[str, Any] | None = None
    """The model it is compared with at equal seeds; null = it is the base model itself."""
    simulated: bool
    """True = no integer kernel ran."""
    note: str | None = None
    """What that means, in words."""
    metrics: dict[str, float | str | None]
    """Numbers by name; a metric that could not run is null, with `<name>_why`."""
    timesteps: list[dict[str, float]] = []
    """Errors per denoiser call: call, timestep, latent_error, latent_mse, noise_error, noise_mse."""
    layers: list[dict[str, Any]] = []
    """Layers of the manifest with weight_sqnr_db and output_error."""
    against: str | None = None
    """metrics.json that `comparison` is with."""
    comparison: dict[str, dict[str, float]] = {}
    """this, other and change (this - other) of every number that both have."""
    protocol: dict[str, Any]
    """How the numbers were obtained; unlike protocols are not compared."""
    gate: str | None = None
    """Conditions of `fail_if` that were true; null = passed."""
    warnings: list[str] = []
    """Warnings of the run."""
    grid_rows: list[str] = []
    """Rows of grid.png."""
    trace_note: str = ""
    """What the per-timestep errors were taken over."""
    seconds: dict[str, float] = {}
    """Wall-clock time per phase."""


def read_evaluation(path: str | Path) -> Evaluation:
    """Read metrics.json, or the one in a folder.

    Raises:
        InputError: no such file, or not what `qdm evaluate` writes.
    """
    path = Path(path).expanduser()
    path = path / METRICS_FILE if path.is_dir() else path
    try:
        return Evaluation.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", path="evaluate.against") from None
    except (ValidationError, ValueError):
        raise InputError(f"{path} is no metrics.json of qdm evaluate", path="evaluate.against") from None


def compare(metrics: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Numbers that both results have: this, other, change."""
    shared = [name for name in METRICS if metrics.get(name) is not None and other.get(name) is not None]
    return {name: {"this": metrics[name], "other": other[name], "change": metrics[name] - other[name]} for name in shared}
