"""Budgets of quality: the fastest schedule of a planner's curve that keeps one, measured on held-out samples (caching spec 4.4, 4.5)."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from qdm_cli.engine.artifact import write_json
from qdm_cli.engine.caching import dp, verify
from qdm_cli.engine.caching.config import CacheBudget, CacheVerify, DpConfig
from qdm_cli.engine.caching.drive import Loop, following
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.planner import Subject, planned
from qdm_cli.engine.caching.runtime import Cache
from qdm_cli.engine.caching.schedule import Schedule
from qdm_cli.engine.diffusion.prompts import CAPTIONS, prompts_for
from qdm_cli.engine.diffusion.sampling import batches
from qdm_cli.engine.errors import EnvironmentProblem, GateFailed, InputError
from qdm_cli.engine.evaluation import fashion
from qdm_cli.engine.evaluation.clip import load_clip
from qdm_cli.engine.evaluation.distribution import Extractor, extract, fashion_extractor, inception_extractor, shipped_reference
from qdm_cli.engine.evaluation.frechet import Gaussian, frechet_distance, gaussian_of
from qdm_cli.engine.evaluation.images import PairedMetrics, load_lpips
from qdm_cli.engine.stages._judge import Models, Tables

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

PART = 500
"""Images whose features are taken at a time."""


@dataclass(frozen=True)
class Criterion:
    """What a budget of quality asks for.

    Attributes:
        name: field of the budget.
        limit: its value.
        measure: cached samples -> the same figure, measured.
        least: the figure must be at least the limit; False = at most.
    """

    name: str
    limit: float
    measure: Callable[[verify.Samples], float]
    least: bool = False

    def kept(self, value: float) -> bool:
        """Whether a measured figure keeps the budget."""
        return value >= self.limit if self.least else value <= self.limit


Complete = Callable[[Schedule], tuple[Schedule, Tables]]
"""A planned schedule as it will be written, and the tables of its corrections."""


def of_quality(
    spec: DpConfig,
    models: Models,
    subject: Subject,
    curve: list[dp.Plan],
    latency: Latency,
    complete: Complete,
    ctx: RunContext,
) -> tuple[Schedule, Tables]:
    """The fastest schedule of the curve that keeps the budget against the same model uncached, as it will run: completed.

    What was measured is kept for a run that continues.

    Raises:
        GateFailed: none does that reuses anything.
        EnvironmentProblem: what the budget is measured with is not on this machine.
        InputError: a budget that this pipeline has no figure for.
    """
    check, own = spec.verify or CacheVerify(), models.own
    sampled = partial(_sampled, own, check, ctx)
    criterion = criterion_of(spec.budget, check, sampled(), models.base, ctx)
    reusing = [plan for plan in curve if len(plan.refreshes) < subject.sampler.calls]
    path = ctx.resume / "budget.json"
    values: dict[str, float] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}

    def as_written(index: int) -> tuple[Schedule, Tables]:
        return complete(planned(reusing[index], curve, spec, subject, latency))

    def passes(index: int) -> bool:
        if str(index) not in values:
            values[str(index)] = criterion.measure(sampled(following(own, *as_written(index))))
            write_json(path, values)
        kept = criterion.kept(values[str(index)])
        ctx.events.log(f"budget: {reached(index)}, {'kept' if kept else 'not kept'}")
        return kept

    def reached(index: int) -> str:
        speedup = latency.full_ms * subject.sampler.calls / reusing[index].latency_ms
        return f"{speedup:.2f}x: {criterion.name} {values[str(index)]:.4g}"

    index = verify.bisected(len(reusing), passes) if reusing else None
    if index is not None:
        return as_written(index)
    nearest = f"the slowest reaches {reached(len(reusing) - 1)}" if reusing else "none is faster than the uncached model"
    text = f"cache.budget: no schedule that reuses anything keeps {criterion.name} {criterion.limit:g}; {nearest}"
    if not (ctx.smoke and reusing):
        raise GateFailed(f"{text}. Allow more error or more cuts.")
    ctx.warn(text)
    return as_written(len(reusing) - 1)


def _sampled(own: Loop, check: CacheVerify, ctx: RunContext, cache: Cache | None = None) -> verify.Samples:
    """Held-out samples of the model that will run, with its progress; None = uncached."""
    task = "budget: held-out samples"
    return verify.sample(own, check.samples, check.batch, cache, lambda done: ctx.events.progress(task, done, check.samples))


def criterion_of(budget: CacheBudget, check: CacheVerify, truth: verify.Samples, base: Loop, ctx: RunContext) -> Criterion:
    """The one figure that a budget names, ready to be measured.

    Args:
        truth: uncached samples of the model that will run.

    Raises:
        EnvironmentProblem, InputError: as `of_quality`.
    """
    (name, limit) = next((name, float(value)) for name, value in budget if value is not None)
    if name == "psnr":
        return Criterion(name, limit, lambda found: _psnr(found, truth), least=True)
    if name == "latent_error":
        return Criterion(name, limit, lambda found: verify.latent_error(found, truth))
    return Criterion(name, limit, {"lpips": _lpips, "clip_drop": _clip_drop, "fid_increase": _fid_increase}[name](check, truth, base, ctx))


def _psnr(found: verify.Samples, truth: verify.Samples) -> float:
    paired = PairedMetrics()
    paired.add(found.images, truth.images)
    return float(paired.metrics()["psnr"] or 0.0)


def _lpips(check: CacheVerify, truth: verify.Samples, base: Loop, ctx: RunContext) -> Callable[[verify.Samples], float]:
    distance, why = load_lpips("auto", offline=ctx.offline)
    if distance is None:
        raise EnvironmentProblem(f"cache.budget.lpips cannot be measured: {why}", path="cache.budget.lpips")
    return lambda found: float(torch.cat([distance(*pair) for pair in _parts(found.images, truth.images)]).mean())


def _clip_drop(check: CacheVerify, truth: verify.Samples, base: Loop, ctx: RunContext) -> Callable[[verify.Samples], float]:
    if "prompt" not in inspect.signature(base.loaded.pipeline.__call__).parameters:
        text = f"{type(base.loaded.pipeline).__name__} takes no prompts, so its images have no CLIP score"
        raise InputError(f"cache.budget.clip_drop: {text}", path="cache.budget.clip_drop")
    score, why = load_clip(check.clip, offline=ctx.offline)
    if score is None:
        raise EnvironmentProblem(f"cache.budget.clip_drop cannot be measured: {why}", path="cache.budget.clip_drop")
    prompts = base.prompts or prompts_for(CAPTIONS)
    texts = [prompts[(verify.VERIFY_START + index) % len(prompts)] for index in range(len(truth.images))]

    def mean(samples: verify.Samples) -> float:
        parts = zip(samples.images.split(PART), range(0, len(texts), PART), strict=True)
        return float(torch.cat([score(images, texts[first : first + len(images)]) for images, first in parts]).mean())

    before = mean(truth)
    return lambda found: before - mean(found)


def _fid_increase(check: CacheVerify, truth: verify.Samples, base: Loop, ctx: RunContext) -> Callable[[verify.Samples], float]:
    extractor, reference = _distribution(check, truth, base, ctx)

    def distance(images: torch.Tensor) -> float:
        return frechet_distance(gaussian_of(extract(extractor, images.split(PART))), reference)

    before = distance(truth.images)
    ctx.events.log(f"budget: Frechet distance of the uncached model {before:.4f} over {len(truth.images)} images")
    return lambda found: distance(found.images) / before - 1


def _distribution(check: CacheVerify, truth: verify.Samples, base: Loop, ctx: RunContext) -> tuple[Extractor, Gaussian]:
    """Features, and the moments that distances are taken to: of real images where they are shipped, else of the full-precision model's
    images from other noise."""
    if tuple(truth.images.shape[1:]) == fashion.SIZE:
        return fashion_extractor(ctx.device), shipped_reference().moments
    extractor, why = inception_extractor(check.inception, offline=ctx.offline, device=ctx.device)
    if extractor is None:
        why = "cache.verify.inception names no weight file" if check.inception is None else why
        raise EnvironmentProblem(f"cache.budget.fid_increase cannot be measured: {why}", path="cache.budget.fid_increase")
    others = batches(
        base.loaded,
        base.sampler,
        count=check.samples,
        batch=check.batch,
        start=verify.VERIFY_START + check.samples,
        prompts=base.prompts,
        seed=base.seed,
    )
    return extractor, gaussian_of(extract(extractor, others))


def _parts(one: torch.Tensor, other: torch.Tensor) -> zip[tuple[torch.Tensor, torch.Tensor]]:
    return zip(one.split(PART), other.split(PART), strict=True)
