"""`cache`: which denoiser calls reuse features, chosen by rule or planned on the model that will run, and measured."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from qdm_cli import __version__
from qdm_cli.engine.artifact import hash_file, write_json
from qdm_cli.engine.caching import dp, emit, forecast, plots, profile
from qdm_cli.engine.caching.config import FEW_STEPS, BlockRange, DpConfig, RuleConfig
from qdm_cli.engine.caching.correct import corrections
from qdm_cli.engine.caching.drive import Loop
from qdm_cli.engine.caching.latency import Latency, measure
from qdm_cli.engine.caching.planner import Subject, planned, problem_of, ruled
from qdm_cli.engine.caching.ranges import remeasured
from qdm_cli.engine.caching.runtime import candidate_cuts, find_cut
from qdm_cli.engine.caching.schedule import (
    CORRECTIONS_FILE,
    Corrections,
    Cut,
    ModelRef,
    Provenance,
    Schedule,
    hash_config,
    write_schedule,
)
from qdm_cli.engine.caching.trace import trace_sampler
from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.context import StageResult
from qdm_cli.engine.diffusion.prompts import prompts_for
from qdm_cli.engine.errors import GateFailed, InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.quant.scale_set import SCALES_FILE
from qdm_cli.engine.quant.state import STATE_FILE, read_state, write_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime.choice import default_mode
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.stages._budget import of_quality
from qdm_cli.engine.stages._judge import Models, Tables, measured_best, verified

if TYPE_CHECKING:
    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.context import RunContext

CACHE_DIT_FILE = "cache-dit.json"
RANGE_SAMPLES = 8
"""Trajectories that activation ranges are measured on again."""
PROFILE_START = 3_000_000
"""Index of the first profiled sample: its noise is that of no calibration, training, held-out or evaluated sample."""


def cache(spec: RuleConfig, source: Artifact | None, ctx: RunContext) -> StageResult:
    """Choose a schedule, measure it on held-out samples, and write `schedule.json` beside the quantized state it was made for.

    Args:
        source: a calibrated or fine-tuned artifact; None = the plain model.

    Raises:
        InputError: few steps, a cut or setting that the model or sampler does not have.
        GateFailed: no schedule reaches the budget.
    """
    started = time.monotonic()
    models = load(source, ctx)
    sampler, guidance = trace_sampler(models.own.loaded, ctx.recipe.sampler)
    if sampler.steps <= FEW_STEPS and not (spec.force or ctx.smoke):
        text = f"{sampler.steps} steps are too few to cache: neighbouring calls differ too much. Set cache.force to try"
        raise InputError(f"sampler.steps: {text}.", path="sampler.steps")
    passes = 2 if guidance.mode == "sequential" else 1
    models = Models(*(replace(loop, passes=passes) for loop in (models.own, models.base))) if passes > 1 else models
    subject = Subject(model_ref(models, source), sampler, guidance, cuts_of(spec, models.own.loaded.denoiser), provenance(spec, ctx))
    latency = measured_latency(spec, models.own, subject, ctx)
    loaded = time.monotonic()
    if isinstance(spec, DpConfig):
        schedule = plan(spec, models, subject, latency, ctx)
    else:
        schedule = ruled(spec, subject, latency)
    chosen = time.monotonic()
    schedule = schedule.model_copy(update={"qdm_version": __version__})
    metrics: dict[str, Any] = {"calls": sampler.calls, "full_calls": len(schedule.refreshes)}
    if schedule.predicted is not None:
        metrics["speedup"] = schedule.predicted.speedup
    tables = None if schedule.corrections is None else read_tensors(ctx.payload / schedule.corrections.file)[0]
    copy_state(source, ctx)
    if spec.ranges == "remeasured" and models.quantized:
        models = with_ranges(models, schedule, tables, ctx)
    if spec.verify is not None:
        schedule, found = verified(schedule, spec.verify, models, subject.cuts, latency, ctx, corrections=tables)
        metrics |= found
    write_files(schedule, latency, ctx)
    return StageResult(
        layers=source.manifest.layers if source is not None else [],
        sampler=ctx.recipe.sampler.model_dump(mode="json"),
        metrics=metrics,
        bytes_by_part=source.manifest.bytes_by_part if source is not None else {},
        base_model=models.base.loaded.identity,
        seeds={"profile": ctx.recipe.seed, "held_out": ctx.recipe.seed},
        seconds={"load": loaded - started, "plan": chosen - loaded, "verify": time.monotonic() - chosen},
        simulated=True,
    )


# ---------------------------------------------------------------- what a schedule is made for


def load(source: Artifact | None, ctx: RunContext) -> Models:
    """The full-precision pipeline and, of a quantized source, the one that will run: on packed integers where its layers allow it."""
    base = _pipeline(ctx)
    loop = Loop(base, ctx.recipe.sampler, prompts=_prompts("builtin:captions-128"), seed=ctx.recipe.seed)
    if source is None or not (source.folder / STATE_FILE).is_file():
        return Models(loop, loop)
    return Models(replace(loop, loaded=_packed(source.folder, ctx)), loop)


def _packed(folder: Path, ctx: RunContext) -> LoadedPipeline:
    own, state = _pipeline(ctx), read_state(folder)
    try:
        pack_denoiser_(own.denoiser, state, default_mode())
    except InputError as error:
        ctx.warn(f"planned on simulated integers, so latency is not that of the export: {error}")
        own = _pipeline(ctx)
        apply_state_(own.denoiser, state)
    own.pipeline.to(ctx.device)
    return own


def _pipeline(ctx: RunContext) -> LoadedPipeline:
    recipe = ctx.recipe
    return load_pipeline(
        recipe.model, recipe.sampler, device=ctx.device, smoke=ctx.smoke, offline=ctx.offline, offload=recipe.device.offload
    )


def _prompts(name: str) -> list[str]:
    return prompts_for(name)


def model_ref(models: Models, source: Artifact | None) -> ModelRef:
    """The denoiser that the schedule is for."""
    denoiser = models.base.loaded.denoiser
    state = source.folder / STATE_FILE if source is not None else None
    return ModelRef(
        class_=type(denoiser).__name__,
        config_sha256=hash_config(denoiser.config),
        weights_sha256=models.base.loaded.identity["digest"],
        quant_sha256=hash_file(state) if state is not None and models.quantized else None,
    )


def provenance(spec: RuleConfig, ctx: RunContext) -> Provenance:
    """Method, time, device and prompts."""
    prompts = _prompts(spec.data.prompts) if isinstance(spec, DpConfig) else None
    return Provenance(
        method=spec.method,  # type: ignore[attr-defined]
        created_utc=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        device=torch.cuda.get_device_name(ctx.device) if ctx.device.startswith("cuda") else ctx.device,
        prompts_sha256=None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
    )


def cuts_of(spec: RuleConfig, denoiser: nn.Module) -> list[Cut]:
    """The cuts that a section names, or the defaults.

    Raises:
        InputError: the model has no such cut; names the setting.
    """
    name = "cuts" if isinstance(spec, DpConfig) else "cut"
    given = getattr(spec, name)
    places = given if isinstance(given, tuple) else (given,)
    try:
        if given == "auto":
            found = candidate_cuts(denoiser)
            found = found if isinstance(spec, DpConfig) else found[:1]
        else:
            found = [find_cut(denoiser, place.range if isinstance(place, BlockRange) else place) for place in places]
        return [cut.model_copy(update={"store_dtype": spec.store}) for cut in found]
    except InputError as error:
        raise InputError(f"cache.{name}: {error}", path=f"cache.{name}") from None


# ---------------------------------------------------------------- planning


def measured_latency(spec: RuleConfig, loop: Loop, subject: Subject, ctx: RunContext) -> Latency:
    """Time of full and partial calls of the model that will run; kept for a run that continues."""
    path = ctx.resume / "latency.json"
    if path.is_file():
        return Latency(**json.loads(path.read_text(encoding="utf-8")))
    batch = spec.latency_batch if isinstance(spec, DpConfig) else 1
    found = measure(loop, subject.cuts, batch=batch, at=subject.sampler.calls // 2, device=ctx.device)
    write_json(path, asdict(found))
    shown = ", ".join(f"{name} {value:.1f} ms" for name, value in found.partial_ms.items())
    ctx.events.log(f"latency at batch {batch}: full call {found.full_ms:.1f} ms; partial calls: {shown}")
    return found


def plan(spec: DpConfig, models: Models, subject: Subject, latency: Latency, ctx: RunContext) -> Schedule:
    """Profile, weigh, search, choose.

    Raises:
        GateFailed: no schedule reaches the budget.
    """
    errors = profiled(spec, models, subject, ctx)
    weights = weighed(spec, models.own if spec.plan_on == "deployed" else models.base, subject, ctx)
    problem = problem_of(spec, subject, errors, weights, latency)
    searches = dp.searched(problem)
    curve = dp.pareto(problem, searches=searches)
    uncached = latency.full_ms * subject.sampler.calls
    budget = spec.budget
    if budget.speedup is not None or budget.latency_ms is not None:
        limit = uncached / budget.speedup if budget.speedup is not None else float(budget.latency_ms or math.inf)
        found = dp.within(problem, limit, searches)
        if found is None:
            text = f"cache.budget: {limit:.1f} ms per trajectory cannot be reached: the fastest schedule takes {curve[0].latency_ms:.1f} ms"
            if not ctx.smoke:
                raise GateFailed(f"{text}, {uncached / curve[0].latency_ms:.2f}x. Allow longer intervals or cheaper cuts.")
            ctx.warn(text)
            found = curve[0]
        elif spec.refine:
            base = replace(models.base, prompts=_prompts(spec.data.prompts))
            own = replace(models.own, prompts=base.prompts) if spec.plan_on == "deployed" else base
            found = measured_best(spec, Models(own, base), batches_of(spec), subject, (errors, weights), latency, limit, ctx)
        schedule, tables = completed(spec, models, planned(found, curve, spec, subject, latency), ctx)
    else:
        schedule, tables = of_quality(spec, models, subject, curve, latency, lambda plain: completed(spec, models, plain, ctx), ctx)
    write_plots(errors, schedule, subject, uncached, ctx)
    provenance = schedule.provenance.model_copy(update={"profile_sha256": hash_file(ctx.payload / profile.PROFILE_FILE)})
    return with_tables(schedule.model_copy(update={"provenance": provenance}), tables, ctx)


def profiled(spec: DpConfig, models: Models, subject: Subject, ctx: RunContext) -> np.ndarray:
    """[B, n, W] error of every prediction at every lag; the measured profile is written beside the schedule."""
    per_step = -(-subject.sampler.calls // subject.sampler.steps)
    window = min(spec.max_interval * per_step, subject.sampler.calls)
    chosen = models.own if spec.plan_on == "deployed" else models.base
    measured = profile.drift(
        replace(chosen, prompts=_prompts(spec.data.prompts)),
        models.base.loaded.denoiser if chosen is not models.base else None,
        subject.cuts,
        subject.sampler,
        window=window,
        lags=window - 1 if spec.drift == "output" else 1,
        line=spec.predict == "linear",
        starts=batches_of(spec),
        resume=ctx.resume,
        progress=lambda done, total: ctx.events.progress("drift profile", done, total),
    )
    measured.write(ctx.payload / profile.PROFILE_FILE)
    return profile.predicted_errors(measured)


def batches_of(spec: DpConfig) -> list[tuple[int, int]]:
    """(first sample, samples) of the profiled batches."""
    total, batch = spec.data.samples, spec.data.batch
    return [(PROFILE_START + first, min(batch, total - first)) for first in range(0, total, batch)]


def weighed(spec: DpConfig, loop: Loop, subject: Subject, ctx: RunContext) -> np.ndarray:
    """[n] weight of an error at each call."""
    calls = subject.sampler.calls
    if spec.sensitivity == "none" or calls < 2:
        return np.ones(calls)
    if spec.sensitivity == "analytic":
        flow = getattr(loop.loaded.pipeline.scheduler, "alphas_cumprod", None) is None
        return profile.analytic_weights(subject.sampler, flow=flow)
    path = ctx.resume / "weights.json"
    if not path.is_file():
        found = profile.rollout_weights(
            replace(loop, prompts=_prompts(spec.data.prompts)),
            subject.cuts[0],
            calls,
            points=spec.rollouts,
            start=PROFILE_START,
            samples=min(spec.data.samples, spec.data.batch),
            progress=lambda done, total: ctx.events.progress("sensitivity of steps", done, total),
        )
        write_json(path, found.tolist())
    return np.asarray(json.loads(path.read_text(encoding="utf-8")))


def completed(spec: DpConfig, models: Models, schedule: Schedule, ctx: RunContext) -> tuple[Schedule, Tables]:
    """The schedule with extrapolation where it helps, and tables of corrections; empty = none."""
    if spec.predict == "linear":
        schedule = extrapolated(spec, models, schedule, ctx)
    return schedule, corrections_of(spec, models.own, schedule) if spec.correction == "dec" else {}


def extrapolated(spec: DpConfig, models: Models, schedule: Schedule, ctx: RunContext) -> Schedule:
    """The schedule with linear extrapolation where it is measured to be nearer than plain reuse."""
    chosen = models.own if spec.plan_on == "deployed" else models.base
    loop = replace(chosen, prompts=_prompts(spec.data.prompts))
    reference = models.base.loaded.denoiser if chosen is not models.base else None
    errors = forecast.extrapolation_errors(loop, reference, schedule, batches_of(spec))
    found = forecast.with_orders(schedule, errors)
    allowed = sum(action.order for action in found.actions)
    ctx.events.log(f"linear extrapolation is nearer at {allowed} of the {len(errors)} partial calls that could use it")
    return found


def corrections_of(spec: DpConfig, loop: Loop, schedule: Schedule) -> Tables:
    """Per-step scales and shifts of the schedule's reused tensors."""
    return corrections(replace(loop, prompts=_prompts(spec.data.prompts)), schedule, batches_of(spec))


# ---------------------------------------------------------------- files


def write_plots(errors: np.ndarray, schedule: Schedule, subject: Subject, uncached_ms: float, ctx: RunContext) -> None:
    """Similarity of every cut that the schedule uses, and the Pareto curve."""
    for index, cut in enumerate(subject.cuts):
        if cut in schedule.cuts:
            (ctx.payload / f"similarity-{cut.id}.png").write_bytes(plots.heat_map(errors[index], schedule, cut.id))
    (ctx.payload / "pareto.png").write_bytes(plots.pareto_chart(schedule, uncached_ms))


def write_files(schedule: Schedule, latency: Latency, ctx: RunContext) -> None:
    """The schedule, its strip, and the measured latencies."""
    write_schedule(ctx.payload, schedule)
    write_json(ctx.payload / "latency.json", asdict(latency))
    (ctx.payload / "schedule.png").write_bytes(plots.strip(schedule))
    if all(cut.kind == "block_residual" for cut in schedule.cuts):  # cache-dit has no form for U-Nets
        write_json(ctx.payload / CACHE_DIT_FILE, emit.cache_dit(schedule))


def with_tables(schedule: Schedule, tables: Tables, ctx: RunContext) -> Schedule:
    """The schedule that names the file of its corrections, which is written; empty tables = it has none."""
    if not tables:
        return schedule
    path = ctx.payload / CORRECTIONS_FILE
    write_tensors(path, dict(tables))
    return schedule.model_copy(update={"corrections": Corrections(file=path.name, sha256=hash_file(path), kind="dec")})


def copy_state(source: Artifact | None, ctx: RunContext) -> None:
    """The quantized state and the personalisation that the schedule goes with."""
    for name in (STATE_FILE, SCALES_FILE):
        if source is not None and (source.folder / name).is_file():
            shutil.copyfile(source.folder / name, ctx.payload / name)


def with_ranges(models: Models, schedule: Schedule, tables: Tables | None, ctx: RunContext) -> Models:
    """The models after the copied state was given the activation ranges of the cached trajectory."""
    state = remeasured(
        read_state(ctx.payload),
        models.base,
        schedule,
        starts=[(PROFILE_START, RANGE_SAMPLES)],
        corrections=tables,
        progress=lambda done, total: ctx.events.progress("ranges along the cached trajectory", done, total),
    )
    write_state(ctx.payload, state)
    return replace(models, own=replace(models.own, loaded=_packed(ctx.payload, ctx)))
