"""--smoke: the whole flow on a shrunken random model in seconds. The pipeline is shrunk by `models.load_pipeline(smoke=True)`."""

from __future__ import annotations

from typing import Any

from qdm_cli.engine.recipe.schema import Recipe

STEPS, SAMPLES, UPDATES, BATCH = 4, 4, 4, 2

_LIMITS: dict[str, int] = {
    "sampler.steps": STEPS,
    "calibrate.data.samples": SAMPLES,
    "calibrate.data.batch": BATCH,
    "calibrate.samples_per_step": SAMPLES,
    "calibrate.sensitivity_samples": 2,
    "calibrate.timestep_groups.k": STEPS,
    "finetune.iterations": UPDATES,
    "finetune.batch_size": BATCH,
    "finetune.accumulate": 1,
    "finetune.rank": 4,
    "finetune.checkpoint_every": 2,
    "finetune.log_every": 1,
    "finetune.data.limit": SAMPLES,
    "finetune.prior.images": SAMPLES,
    "finetune.intervals.k": STEPS,
    "finetune.sampler.steps": STEPS,
    "cache.interval": 2,
    "cache.center": 1,
    "cache.data.samples": BATCH,
    "cache.data.batch": BATCH,
    "cache.rollouts": 2,
    "cache.refine": 2,
    "cache.max_interval": STEPS,
    "cache.verify.samples": BATCH,
    "cache.verify.batch": BATCH,
    "evaluate.samples": SAMPLES,
    "evaluate.batch": BATCH,
    "evaluate.grid": SAMPLES,
}
_SUITE_LIMITS = {"samples": SAMPLES, "repeats": 3, "batch": 1}


def smoke_recipe(recipe: Recipe) -> Recipe:
    """The recipe with at most 4 steps, samples and updates; sizes, gates and metric weights that need the real model are dropped."""
    data = recipe.model_dump(mode="python")
    for path, limit in _LIMITS.items():
        _cap(data, path.split("."), limit)
    data["sampler"]["size"] = None
    data["model"] |= {"dtype": "float32", "loras": ()}
    if data["quantize"]["auto"] and data["quantize"]["auto"]["max_size"]:
        data["quantize"]["auto"] = None
    if data["finetune"] and "images" in data["finetune"].get("data", {}):
        # the recipe's own images need not be there
        data["finetune"]["data"] |= {"images": "builtin:digits", "limit": SAMPLES}
    if data["cache"]:
        data["cache"]["force"] = True
        if "budget" in data["cache"]:
            data["cache"]["budget"] = {"speedup": 1.2}
        if "mask" in data["cache"]:
            data["cache"]["mask"] = ("".join(digit for digit in data["cache"]["mask"] if digit in "01"))[:STEPS]
    if data["evaluate"]:
        data["evaluate"] |= {"fail_if": (), "against": "base", "weights": {}}
        for suite in data["evaluate"]["suites"]:
            for name, limit in _SUITE_LIMITS.items():
                _cap(suite, [name], limit)
    return Recipe.model_validate(data)


def _cap(data: Any, path: list[str], limit: int) -> None:
    """Lower one number; sections and fields that the recipe's methods do not have, and null, stay."""
    for part in path[:-1]:
        data = data.get(part) if isinstance(data, dict) else None
    if isinstance(data, dict) and isinstance(data.get(path[-1]), int):
        data[path[-1]] = min(data[path[-1]], limit)
