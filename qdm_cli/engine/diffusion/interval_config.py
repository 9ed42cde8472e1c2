"""How a recipe asks for time-step intervals. Imports neither torch nor diffusers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from qdm_cli.engine.spec import Spec


class IntervalSpec(Spec):
    """Contiguous intervals of denoising time."""

    method: Literal["uniform", "optimal_denoiser", "model_x0"] = "uniform"
    """uniform = equal lengths; optimal_denoiser = clustered by how alike the best possible denoiser's outputs are (2312.09181);
    model_x0 = the same with the model's own predictions, for models with text."""
    k: int = Field(2, ge=1, le=100)
    """Number of intervals."""
    min_len: int = Field(2, ge=1)
    """Least nodes of the grid of 21 times in a cluster."""
    samples: int = Field(256, ge=2)
    """Images or latents that similarity is measured on."""
