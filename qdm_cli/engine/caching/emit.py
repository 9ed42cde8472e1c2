"""Schedules in the forms that other tools read (caching spec 4.6). Imports neither torch nor diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdm_cli.engine.caching.schedule import Schedule


def step_mask(schedule: Schedule) -> list[int]:
    """[steps] 1 = the step begins with a full call, 0 = it reuses; the inverse of `rules.from_mask`."""
    full = {schedule.sampler.step_of_call[call] for call in schedule.refreshes}
    return [int(step in full) for step in range(schedule.sampler.step_of_call[-1] + 1)]


def cache_dit(schedule: Schedule) -> dict[str, Any]:
    """Keyword arguments of cache-dit's `DBCacheConfig`: the mask alone decides, no threshold.

    cache-dit has no adapter for U-Nets: use it for the schedules of transformers.
    """
    mask = step_mask(schedule)
    return {
        "num_inference_steps": len(mask),
        "max_warmup_steps": 0,  # warm-up steps would be computed whatever the mask says
        "steps_computation_mask": mask,
        "steps_computation_policy": "static",
    }


def smoothcache(schedule: Schedule, layers: Sequence[str] = ("attn1", "attn2", "ff")) -> dict[str, list[int]]:
    """SmoothCache's schedule file: layer type -> [steps] 1 = compute, 0 = reuse. Here all types follow one mask."""
    return {layer: step_mask(schedule) for layer in layers}


def summary(schedule: Schedule) -> dict[str, Any]:
    """What a schedule does, for people and comparisons."""
    figures = schedule.verified or schedule.predicted
    return {
        "method": schedule.provenance.method,
        "calls": schedule.sampler.calls,
        "full_calls": len(schedule.refreshes),
        "cuts": [cut.id for cut in schedule.cuts],
        "speedup": None if figures is None else figures.speedup,
        "verified": schedule.verified is not None,
        "corrected": schedule.corrections is not None,
        "mask": "".join(map(str, step_mask(schedule))),
    }
