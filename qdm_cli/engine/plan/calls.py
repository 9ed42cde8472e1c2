"""How often each stage calls the denoiser, and with how many images."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.caching import latency
from qdm_cli.engine.caching.config import DpConfig
from qdm_cli.engine.evaluation.config import CostSuite
from qdm_cli.engine.evaluation.cost import WARM_UP
from qdm_cli.engine.evaluation.sensitivity import TIMESTEPS
from qdm_cli.engine.evaluation.session import TRACE_SAMPLES
from qdm_cli.engine.quant.scale_config import PROBES, AdaptConfig

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import Recipe

EXPORT_PROBES = 3
"""Calls of the export's self-check, by each of the two models."""


@dataclass(frozen=True)
class Calls:
    """Equal denoiser calls of one phase.

    Attributes:
        stage, phase: where they happen.
        count: calls. `images`: images per call, before guidance doubles them.
        training: with a backward pass through the quantized model.
        guided: guidance doubles the images of a call, where the pipeline has it.
    """

    stage: str
    phase: str
    count: int
    images: int
    training: bool = False
    guided: bool = True


def train_steps(recipe: Recipe) -> int | None:
    """Steps of the training trajectories where they differ from the sampler's; None = they do not, or there are none."""
    return getattr(getattr(recipe.finetune, "sampler", None), "steps", None)


def denoiser_calls(recipe: Recipe, layers: int, units: int = 0) -> list[Calls]:
    """All phases of a recipe that call the denoiser. A sampler with two calls per step (Heun) is counted as one.

    Args:
        layers: Linear and Conv2d layers of the denoiser.
        units: blocks and single layers that are reconstructed.
    """
    steps = recipe.sampler.steps
    found: list[Calls] = []
    if recipe.calibrate is not None:
        data, own = recipe.calibrate.data, min(recipe.calibrate.samples_per_step, recipe.calibrate.data.samples)
        found.append(Calls("calibrate", "trajectories", ceil(data.samples / data.batch) * steps, min(data.batch, data.samples)))
        static = recipe.quantize.activations is not None and recipe.quantize.activations.mode == "static"
        found.append(Calls("calibrate", "ranges", steps * ceil(own / data.batch) if static else 0, min(own, data.batch)))
        found += _sensitivity(recipe.calibrate, steps, layers)
        found += _reconstruction(recipe.calibrate, steps, units)
    if isinstance(recipe.finetune, AdaptConfig):
        found += _adaptation(recipe.finetune, steps)
    elif recipe.finetune is not None:
        cfg = recipe.finetune
        own_steps = train_steps(recipe) or steps
        pools = ceil(cfg.iterations / max(1, own_steps // cfg.accumulate))
        found.append(Calls("finetune", "trajectories", (pools + 1) * own_steps, cfg.batch_size))
        found.append(Calls("finetune", "training", cfg.iterations * cfg.accumulate, cfg.batch_size, training=True))
    if recipe.cache is not None:
        found += _caching(recipe, steps)
    if recipe.export is not None and recipe.export.verify:
        found.append(Calls("export", "self-check", 2 * EXPORT_PROBES + 1, 1))
    if recipe.evaluate is not None:
        found += _evaluation(recipe, steps)
    return [calls for calls in found if calls.count]


def _sensitivity(spec: Any, steps: int, layers: int) -> Iterator[Calls]:
    """Per width the captured calls once, each layer computed three times; end to end one sampling per layer and width, and one without."""
    widths, samples = len(spec.sensitivity_bits), spec.sensitivity_samples
    if spec.sensitivity != "off":
        yield Calls("calibrate", "sensitivity", 3 * widths * min(TIMESTEPS, steps), min(samples, spec.data.batch))
    if spec.sensitivity == "end_to_end":
        yield Calls("calibrate", "sensitivity of the image", (layers * widths + 1) * steps, samples)


def _reconstruction(spec: Any, steps: int, units: int) -> list[Calls]:
    """Unit data takes both models up to the unit, on average one whole call; an update of all units costs as much as a forward and a
    backward of the denoiser, which is three calls."""
    if not (passes := spec.passes()):
        return []
    own = min(spec.samples_per_step, spec.data.samples)
    calls = min(spec.calibration_steps, steps) * ceil(own / spec.data.batch)
    return [
        Calls("calibrate", "unit data", len(passes) * units * calls, min(own, spec.data.batch)),
        Calls("calibrate", "reconstruction", 3 * sum(passes), spec.batch_size, guided=False),
    ]


def _adaptation(cfg: AdaptConfig, steps: int) -> list[Calls]:
    """Prior samples once, a batch of images (and one of prior samples) per part of an update, the loss on fixed images at checkpoints."""
    updates, measures = cfg.iterations * cfg.accumulate, 1 + ceil(cfg.iterations / cfg.checkpoint_every)
    found = [
        Calls("finetune", "training", updates * (2 if cfg.prior else 1), cfg.batch_size, training=True, guided=False),
        Calls("finetune", "loss on fixed images", measures * ceil(PROBES / cfg.batch_size), cfg.batch_size, guided=False),
    ]
    if cfg.prior is not None:
        found.append(Calls("finetune", "prior samples", ceil(cfg.prior.images / cfg.batch_size) * steps, cfg.batch_size))
    return found


def _caching(recipe: Recipe, steps: int) -> list[Calls]:
    """Full calls; the partial ones among the held-out samples count as full, those that are timed or profiled are left out."""
    cache: Any = recipe.cache
    quantized = recipe.calibrate is not None or recipe.finetune is not None
    planned = isinstance(cache, DpConfig)
    found = [Calls("cache", "latency", latency.WARM_UP + latency.REPEATS, cache.latency_batch if planned else 1)]
    if planned:
        data = cache.data
        images = min(data.samples, data.batch)
        found.append(Calls("cache", "drift profile", ceil(data.samples / data.batch) * steps * (1 + quantized), images))
        if cache.sensitivity == "rollout":
            found.append(Calls("cache", "sensitivity", steps + min(cache.rollouts, steps - 1) * (steps + 1) // 2, images))
        passes = ceil(data.samples / data.batch) * steps
        if cache.refine and (cache.budget.speedup or cache.budget.latency_ms):
            found.append(Calls("cache", "plans compared", (cache.refine + 1) * passes, images))
        if cache.predict == "linear":
            found.append(Calls("cache", "extrapolation compared", passes * (1 + quantized), images))
        if cache.correction == "dec":
            found.append(Calls("cache", "corrections", passes, images))
    if cache.verify is not None:
        check = cache.verify
        sets = 2 + 2 * quantized + (check.baseline != "none") + 3 * (check.baseline == "all")
        found.append(Calls("cache", "held-out samples", sets * ceil(check.samples / check.batch) * steps, min(check.samples, check.batch)))
    return found


def _evaluation(recipe: Recipe, steps: int) -> list[Calls]:
    """Images of both models once for all suites, trajectories for the errors per timestep, timed calls."""
    spec = recipe.evaluate
    assert spec is not None
    images = {suite.method: suite.samples or spec.samples for suite in spec.suites if not isinstance(suite, CostSuite)}
    found = []
    if images:
        count = max(images.values())
        found.append(Calls("evaluate", "images", 2 * ceil(count / spec.batch) * steps, min(count, spec.batch)))
    if "fidelity" in images:
        traced = min(TRACE_SAMPLES, images["fidelity"])
        # each trajectory with both models, and the compressed model once more along the base model's
        found.append(Calls("evaluate", "errors per timestep", 3 * steps, traced))
    for suite in spec.suites:
        if isinstance(suite, CostSuite):
            found.append(Calls("evaluate", "timing", 2 * (suite.repeats + WARM_UP), suite.batch))
    return found
