"""Schedules judged on held-out samples: the 2 x 2 table, fewer steps at equal time, and budgets of quality (caching spec 4.5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from qdm_cli.engine.artifact import write_json
from qdm_cli.engine.caching import dp, rules, verify
from qdm_cli.engine.caching.config import CacheVerify, DpConfig
from qdm_cli.engine.caching.drive import Loop, following, relative_errors
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.planner import Subject, planned, problem_of, starting_plans
from qdm_cli.engine.caching.refine import Trials, refined
from qdm_cli.engine.caching.runtime import Cache
from qdm_cli.engine.caching.schedule import Cut, Figures, Schedule, schedule_from_refreshes
from qdm_cli.engine.evaluation.images import PairedMetrics

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

Tables = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Models:
    """own: the model that will run. base: the full-precision one; the same object where nothing is quantized."""

    own: Loop
    base: Loop

    @property
    def quantized(self) -> bool:
        return self.own is not self.base


def verified(
    schedule: Schedule,
    spec: CacheVerify,
    models: Models,
    cuts: list[Cut],
    latency: Latency,
    ctx: RunContext,
    *,
    corrections: Tables | None = None,
) -> tuple[Schedule, dict[str, float | None]]:
    """The schedule with its measured figures, and the metrics of the manifest; warns where quantization and cache amplify each other.

    Args:
        cuts: those that a uniform rival may use.
        corrections: tables of the schedule; None = none.
    """

    def sample(loop: Loop, cache: Cache | None = None) -> verify.Samples:
        return verify.sample(loop, spec.samples, spec.batch, cache, lambda done: ctx.events.progress("verification", done, spec.samples))

    truth = sample(models.base)
    uncached = sample(models.own) if models.quantized else truth
    cached = sample(models.own, following(models.own, schedule, corrections))
    found = chosen_scores(spec, cached, truth)
    metrics: dict[str, float | None] = {"speedup_loop": uncached.seconds / cached.seconds, **found}
    metrics["latent_error_to_uncached"] = verify.latent_error(cached, uncached)
    if models.quantized:
        other = sample(models.base, following(models.base, schedule, corrections))
        table = verify.Interaction(*(verify.latent_error(samples, truth) for samples in (other, uncached, cached)))
        metrics |= table.metrics()
        rows = "; ".join(f"{name} {plain:.4f}, cached {both:.4f}" for name, plain, both in verify.table_rows(table))
        ctx.events.log(f"latent error against full precision: {rows}")
        if table.excess > 0.1 * (table.cache + table.quantization):
            alone = f"{table.cache:.4f} (cache) and {table.quantization:.4f} (quantization) alone"
            ctx.warn(f"cache and quantization amplify each other: latent error {table.joint:.4f} together, {alone}")
    share = latency.of(schedule) / (latency.full_ms * schedule.sampler.calls)
    baseline: dict[str, float | None] = {}
    if spec.baseline != "none" and share < 1:
        fewer = verify.fewer_steps(models.own, share)
        other = sample(fewer)
        baseline = {"steps": float(fewer.sampler.steps), **chosen_scores(spec, other, truth)}
        metrics |= {f"fewer_steps_{name}": value for name, value in baseline.items()}
        ctx.events.log(f"{fewer.sampler.steps} uncached steps take the same time: " + _shown(baseline) + "; cached: " + _shown(found))
    if spec.baseline == "all":
        metrics |= against_uniform(schedule, spec, cuts, models.own, latency, uncached, ctx)
    figures = Figures(latency_ms=latency.of(schedule), speedup=1 / share, metrics=metrics, baseline=baseline)
    return schedule.model_copy(update={"verified": figures}), metrics


def against_uniform(
    schedule: Schedule, spec: CacheVerify, cuts: list[Cut], loop: Loop, latency: Latency, uncached: verify.Samples, ctx: RunContext
) -> dict[str, float | None]:
    """Error and time of the uniform schedule that comes nearest to the uncached model, given no less time than `schedule`."""
    found: list[tuple[float, float, str, int]] = []
    for name, interval in verify.uniform_rivals(schedule.sampler, latency, latency.of(schedule)):
        full = rules.to_calls(rules.uniform(schedule.sampler.step_of_call[-1] + 1, interval), schedule.sampler.step_of_call)
        cut = [cut for cut in cuts if cut.id == name]
        rival = schedule_from_refreshes(full, cuts=cut, model=schedule.model, sampler=schedule.sampler)
        samples = verify.sample(loop, spec.samples, spec.batch, following(loop, rival))
        found.append((verify.latent_error(samples, uncached), latency.of(rival), name, interval))
    if not found:
        return {"uniform_latent_error_to_uncached": None}
    error, time_ms, name, interval = min(found)
    ctx.events.log(
        f"best uniform schedule: every {interval}th step in full, {name}: {time_ms:.1f} ms, latent error {error:.4f} to uncached"
    )
    return {"uniform_latent_error_to_uncached": error, "uniform_latency_ms": time_ms, "uniform_interval": float(interval)}


def scores(own: verify.Samples, truth: verify.Samples) -> dict[str, float | None]:
    """PSNR, SSIM (None for images below its window) and latent error of one set of samples against another."""
    paired = PairedMetrics()
    paired.add(own.images, truth.images)
    found = paired.metrics()
    return {"psnr": found["psnr"], "ssim": found["ssim"], "latent_error": verify.latent_error(own, truth)}  # type: ignore[dict-item]


def chosen_scores(spec: CacheVerify, own: verify.Samples, truth: verify.Samples) -> dict[str, float | None]:
    """The scores that `verify.metrics` names."""
    names = {"psnr": "psnr", "ssim": "ssim", "latent": "latent_error"}
    found = scores(own, truth)
    return {names[name]: found[names[name]] for name in spec.metrics}


def _shown(values: dict[str, float | None]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in values.items() if value is not None and name != "steps")


def measured_best(
    spec: DpConfig,
    models: Models,
    batches: list[tuple[int, int]],
    subject: Subject,
    measured: tuple[np.ndarray, np.ndarray],
    latency: Latency,
    limit_ms: float,
    ctx: RunContext,
) -> dp.Plan:
    """The plan within `limit_ms` whose trajectories end nearest to those of the uncached full-precision model; trials are kept for a run
    that continues.

    Full precision, since a reused tensor also brings the errors of quantization of another call: at 4 bits, plans of equal distance to the
    quantized model's own trajectory differ in their distance to the true one.

    Args:
        models: own runs along the plans, base is the truth; both with the prompts of the samples.
        batches: (first sample, samples) of the trajectories.
        measured: errors and weights, as `problem_of` takes them.
    """
    truth: list[torch.Tensor] = []
    path = ctx.resume / "trials.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []

    def errors(plan: dp.Plan) -> np.ndarray:
        if not truth:
            truth.extend(models.base.run(start, count) for start, count in batches)
        with following(models.own, planned(plan, [], spec, subject, latency)):
            found = [relative_errors(models.own.run(start, count), true) for (start, count), true in zip(batches, truth, strict=True)]
        values = torch.cat(found).numpy().astype(np.float64)
        stored.append([plan.refreshes, plan.cuts, values.tolist()])
        write_json(path, stored)
        ctx.events.progress("plans compared", len(stored), spec.refine)
        return values

    problem, starts = problem_of(spec, subject, *measured, latency), starting_plans(spec, subject, measured, latency, limit_ms)
    trials = Trials(errors, spec.refine, {(tuple(refreshes), tuple(cuts)): np.array(values) for refreshes, cuts, values in stored})
    best = refined(problem, starts, limit_ms, trials)
    if trials.knows(best):
        ends = f"the chosen one has error {trials.error(best):.4f} on its own samples, the first {trials.error(starts[0]):.4f}"
        ctx.events.log(f"of {len(trials.errors)} plans {ends}")
    return best
