"""Plans compared by measured error: neighbours keep every constraint, trials are bounded, and the result is never worse than the starts."""

from __future__ import annotations

import numpy as np
import pytest

from qdm_cli.engine.caching import dp
from qdm_cli.engine.caching.refine import Trials, neighbours, refined


def problem_of(calls: int = 12, cuts: int = 2, seed: int = 0, **more: object) -> dp.Problem:
    rng = np.random.default_rng(seed)
    drift = np.cumsum(rng.uniform(0.1, 1, (cuts, calls, 6)), axis=2) * np.linspace(1, 0.4, cuts)[:, None, None]
    drift[:, :, 0] = 0
    return dp.Problem(drift=drift, weights=rng.uniform(0.5, 2, calls), full_ms=10.0, partial_ms=np.array([1.0, 4.0])[:cuts], **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "more", [{}, {"forced": frozenset({11})}, {"starts": frozenset(range(0, 12, 2))}], ids=["free", "forced", "aligned"]
)
def test_neighbours_differ_in_one_place_and_keep_the_constraints(more: dict[str, object]) -> None:
    problem = problem_of(**more)
    plan = dp.within(problem, 80.0)
    assert plan is not None
    found = list(neighbours(problem, plan, 80.0))
    for other in found:
        if added := set(other.refreshes) - set(plan.refreshes) if len(other.refreshes) > len(plan.refreshes) else set():
            assert len(added) == 1 and set(plan.refreshes) < set(other.refreshes)
        else:
            moved = sum(a != b for a, b in zip(plan.refreshes, other.refreshes, strict=True))
            assert moved + sum(a != b for a, b in zip(plan.cuts, other.cuts, strict=True)) == 1
        assert other.latency_ms <= 80.0
        assert other == dp.evaluate(problem, other.refreshes, other.cuts) and np.isfinite(other.cost)
        assert problem.starts is None or set(other.refreshes) <= problem.starts
    assert found or "starts" in more


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
def test_the_best_measured_plan_within_the_trials(limit: int) -> None:
    """The measured error prefers full calls late, which no start has."""
    problem = problem_of()
    starts = [plan for plan in (dp.within(problem, 80.0), dp.within(problem, 60.0)) if plan is not None]
    asked: list[dp.Plan] = []

    def measure(plan: dp.Plan) -> np.ndarray:
        asked.append(plan)
        return np.full(3, 1 / (1 + sum(plan.refreshes)))

    def error(plan: dp.Plan) -> float:
        return float(measure(plan).mean())

    best = refined(problem, starts, 80.0, Trials(measure, limit))
    assert len(asked) <= limit and len({(plan.refreshes, plan.cuts) for plan in asked}) == len(asked)
    assert best == starts[0] if limit == 1 else error(best) == min(map(error, [*asked]))
    if limit == 100:
        assert all(error(other) >= error(best) for other in neighbours(problem, best, 80.0))


def test_what_one_trajectory_alone_prefers_is_not_chosen() -> None:
    """Every other plan has the smaller mean, by one trajectory out of four; a plan that is nearer on all of them is taken."""
    problem = problem_of()
    first, second = (dp.within(problem, limit) for limit in (80.0, 60.0))
    assert first is not None and second is not None
    lucky, sure = np.array([0.1, 1.05, 1.02, 1.04]), np.array([0.9, 0.95, 0.92, 0.94])

    def chosen(other: np.ndarray) -> dp.Plan:
        return refined(problem, [first, second], 80.0, Trials(lambda plan: np.ones(4) if plan == first else other, 30))

    assert lucky.mean() < 1 and chosen(lucky) == first
    assert chosen(sure) == second
