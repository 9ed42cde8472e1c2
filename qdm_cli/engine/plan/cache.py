"""Multiply-adds of full and partial denoiser calls, and of a whole trajectory where a rule fixes which is which."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from qdm_cli.engine.caching.config import DpConfig
from qdm_cli.engine.caching.macs import CallMacs, mean_macs
from qdm_cli.engine.caching.planner import full_steps
from qdm_cli.engine.plan.inputs import call_shape, example_inputs
from qdm_cli.engine.stages.cache import cuts_of

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import Recipe


def cache_macs(recipe: Recipe, denoiser: nn.Module, pipeline_class: str, *, smoke: bool) -> dict[str, Any] | None:
    """Of one image, guidance included, attention products included; None = the recipe has no cache.

    full_g, partial_g (by cut); full_steps and mean_g per call are null where the planner decides.

    Args:
        denoiser: on the meta device.

    Raises:
        InputError: a cut that the model lacks, or settings that do not fit the steps.
    """
    spec: Any = recipe.cache
    if spec is None:
        return None
    macs = CallMacs(denoiser, example_inputs(denoiser, call_shape(recipe, denoiser, pipeline_class, 1, smoke=smoke)))
    cuts, steps = cuts_of(spec, denoiser), recipe.sampler.steps
    full, partial = macs.full.total, {cut.id: macs.partial(cut).total for cut in cuts}
    found: dict[str, Any] = {
        "full_g": full / 1e9,
        "partial_g": {name: count / 1e9 for name, count in partial.items()},
        "steps": steps,
        "full_steps": None,
        "mean_g": None,
    }
    if not isinstance(spec, DpConfig):
        found["full_steps"] = len(full_steps(spec, steps))
        found["mean_g"] = mean_macs(full, partial[cuts[0].id], found["full_steps"], steps) / 1e9
    return found
