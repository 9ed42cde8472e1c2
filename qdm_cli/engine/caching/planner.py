"""From settings and measurements to a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from qdm_cli.engine.caching import dp, rules
from qdm_cli.engine.caching.config import DeepCacheConfig, DeepCacheLdmConfig, DpConfig, MaskConfig, UniformConfig
from qdm_cli.engine.caching.forecast import linear
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.profile import added_errors
from qdm_cli.engine.caching.schedule import (
    Cut,
    Figures,
    Guidance,
    ModelRef,
    ParetoPoint,
    Provenance,
    SamplerRef,
    Schedule,
    schedule_from_refreshes,
)
from qdm_cli.engine.errors import InputError

FLATTER = 0.75
"""Power of weights that are taken to overstate early steps: later ones correct part of an early error."""


@dataclass(frozen=True)
class Subject:
    """What a schedule is made for."""

    model: ModelRef
    sampler: SamplerRef
    guidance: Guidance
    cuts: list[Cut]
    provenance: Provenance = field(default_factory=Provenance)


def full_steps(spec: Any, steps: int) -> tuple[int, ...]:
    """Steps computed in full by a rule's settings.

    Raises:
        InputError: settings that do not fit the number of steps; names the field.
    """
    name = "interval"
    try:
        if isinstance(spec, MaskConfig):
            name = "mask"
            chosen = rules.from_mask(spec.mask)
            length = sum(digit in "01" for digit in spec.mask)
            if length != steps:
                raise ValueError(f"has {length} digits for {steps} steps")
            return chosen
        if isinstance(spec, UniformConfig):
            return rules.uniform(steps, spec.interval)
        if isinstance(spec, DeepCacheLdmConfig):
            return rules.deepcache_ldm(steps, spec.interval, spec.power)
        assert isinstance(spec, DeepCacheConfig)
        name = "center" if spec.center >= steps else "power"
        if spec.formula == "paper":
            return rules.deepcache_paper(steps, spec.interval, spec.center, spec.power)
        return rules.deepcache(steps, spec.interval, spec.center, spec.power)[0]
    except ValueError as error:
        raise InputError(f"cache.{name}: {error}", path=f"cache.{name}") from None


def ruled(spec: Any, subject: Subject, latency: Latency) -> Schedule:
    """The schedule of a rule: one cut, full calls at the first call of its full steps."""
    steps = subject.sampler.step_of_call[-1] + 1
    refreshes = rules.to_calls(full_steps(spec, steps), subject.sampler.step_of_call)
    return _complete(
        schedule_from_refreshes(
            refreshes,
            cuts=subject.cuts,
            model=subject.model,
            sampler=subject.sampler,
            guidance=subject.guidance,
            provenance=subject.provenance,
        ),
        latency,
    )


def problem_of(spec: DpConfig, subject: Subject, errors: np.ndarray, weights: np.ndarray, latency: Latency) -> dp.Problem:
    """The search problem of a profile. One cut for all segments where calls extrapolate: the line needs the same tensor twice.

    Args:
        errors: [B, n, W] error of each prediction at each lag.
        weights: [n] effect of an error of each prediction on the last latent.
    """
    power = 2 if spec.objective == "squares" else 1
    steps = np.asarray(subject.sampler.step_of_call)
    last = int(steps[-1])
    forced = {call for call, step in enumerate(steps) if step < spec.first_full or step > last - spec.last_full}
    starts = frozenset(call for call in range(len(steps)) if call == 0 or steps[call] != steps[call - 1])
    return dp.Problem(
        drift=added_errors(errors**power),
        weights=weights**power,
        full_ms=latency.full_ms,
        partial_ms=np.array([latency.partial_ms[cut.id] for cut in subject.cuts]),
        forced=frozenset(forced),
        starts=starts if spec.align == "step" else None,
        objective="sum" if spec.objective == "squares" else spec.objective,
        mixed=spec.mixed and spec.predict == "reuse",
    )


def starting_plans(
    spec: DpConfig, subject: Subject, measured: tuple[np.ndarray, np.ndarray], latency: Latency, limit_ms: float
) -> list[dp.Plan]:
    """Plans worth a trajectory: the best by the recipe's objective, by other objectives, and the uniform schedule that fits in.

    Args:
        measured: errors and weights, as `problem_of` takes them.
    """
    errors, weights = measured
    own, found = problem_of(spec, subject, errors, weights, latency), []
    for objective, power in dict.fromkeys([(spec.objective, 1.0), ("sum", 1.0), ("squares", 1.0), ("sum", FLATTER)]):
        problem = problem_of(spec.model_copy(update={"objective": objective}), subject, errors, weights**power, latency)
        if (plan := dp.within(problem, limit_ms)) is not None:
            found.append(dp.evaluate(own, plan.refreshes, plan.cuts))
    return [*found, *_uniform_within(own, subject, limit_ms)]


def _uniform_within(problem: dp.Problem, subject: Subject, limit_ms: float) -> list[dp.Plan]:
    """The uniform schedule of least predicted cost among those that keep constraints and time; empty = none does."""
    of_call = subject.sampler.step_of_call
    fitting = []
    for interval in range(2, of_call[-1] + 2):
        refreshes = rules.to_calls(rules.uniform(of_call[-1] + 1, interval), of_call)
        for cut in range(len(subject.cuts)):
            plan = dp.evaluate(problem, refreshes, (cut,) * len(refreshes))
            if plan.latency_ms <= limit_ms and math.isfinite(plan.cost):
                fitting.append(plan)
    return sorted(fitting, key=lambda plan: plan.cost)[:1]


def planned(plan: dp.Plan, curve: list[dp.Plan], spec: DpConfig, subject: Subject, latency: Latency) -> Schedule:
    """A found plan as a schedule, with the curve that it was chosen from; with `predict: linear` every call that can extrapolate does."""
    schedule = schedule_from_refreshes(
        plan.refreshes,
        cuts=subject.cuts,
        of_segment=[subject.cuts[cut].id for cut in plan.cuts],
        model=subject.model,
        sampler=subject.sampler,
        guidance=subject.guidance,
        provenance=subject.provenance,
        pareto=tuple(point_of(other, spec) for other in curve),
    )
    return _complete(linear(schedule) if spec.predict == "linear" else schedule, latency, cost_of(plan, spec))


def point_of(plan: dp.Plan, spec: DpConfig) -> ParetoPoint:
    """A plan as a point of the curve in `schedule.json`."""
    return ParetoPoint(k=len(plan.refreshes), cost=cost_of(plan, spec), latency_ms=plan.latency_ms, refresh=plan.refreshes)


def cost_of(plan: dp.Plan, spec: DpConfig) -> float:
    """What the objective minimises, as an error."""
    if spec.objective == "squares":
        return math.sqrt(plan.cost)
    return plan.value(spec.objective)[0]


def _complete(schedule: Schedule, latency: Latency, cost: float | None = None) -> Schedule:
    """The schedule with its predicted figures."""
    uncached, cached = latency.full_ms * schedule.sampler.calls, latency.of(schedule)
    return schedule.model_copy(update={"predicted": Figures(cost=cost, latency_ms=cached, speedup=uncached / cached)})
