"""The schedule search against enumeration of every schedule, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from qdm_cli.engine.caching import dp, rules, segments


def problem(calls: int = 7, cuts: int = 2, longest: int = 4, seed: int = 0, **fields: object) -> dp.Problem:
    """Random drift, whole-number latencies in whole milliseconds, the unit of the search."""
    random = np.random.default_rng(seed)
    base = {
        "drift": random.random((cuts, calls, longest)) * np.arange(longest) ** 1.3,
        "weights": random.random(calls) + 0.2,
        "full_ms": 64.0,
        "unit_ms": 1.0,
        "partial_ms": random.choice(np.arange(1, 40), cuts, replace=False).astype(float),
    }
    return dp.Problem(**{**base, **fields})  # type: ignore[arg-type]


def every_schedule(given: dp.Problem) -> Iterator[dp.Plan]:
    """All valid schedules by enumeration of the full calls and of one cut per segment, costed by the definition."""
    n, cuts = given.calls, range(given.drift.shape[0])
    allowed = given.starts if given.starts is not None else frozenset(range(n))
    for bits in product((0, 1), repeat=n - 1):
        full = (0, *(call for call, bit in enumerate(bits, 1) if bit))
        ends = [*full[1:], n]
        longest_segment = max(end - start for start, end in zip(full, ends, strict=True))
        if longest_segment > given.drift.shape[2] or not given.forced <= set(full) or not set(full) <= allowed | given.forced | {0}:
            continue
        for chosen in product(cuts, repeat=len(full)):
            if not given.mixed and len(set(chosen)) > 1:
                continue
            errors = [
                given.weights[t] * given.drift[b, i, t - i] for i, j, b in zip(full, ends, chosen, strict=True) for t in range(i + 1, j)
            ]
            latency = sum(given.full_ms + (j - i - 1) * given.partial_ms[b] for i, j, b in zip(full, ends, chosen, strict=True))
            yield dp.Plan(full, chosen, sum(errors), max(errors, default=0.0), latency)


CASES = {
    "two cuts mixed": {},
    "three cuts mixed": {"cuts": 3, "calls": 6},
    "one cut each": {"mixed": False, "calls": 9},
    "single cut": {"cuts": 1, "calls": 10, "longest": 5},
    "forced calls": {"forced": frozenset({1, 5})},
    "starts": {"starts": frozenset({0, 2, 4, 6}), "forced": frozenset({3})},
    "long segments": {"longest": 9, "calls": 7},
}


@pytest.mark.parametrize("objective", ["sum", "minimax", "lexicographic"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_search_is_exact(case: dict[str, object], objective: dp.Objective) -> None:
    """For every budget: no schedule within it is better than the one found."""
    for seed in range(3):
        given = problem(**case, seed=seed, objective=objective)  # type: ignore[arg-type]
        schedules = list(every_schedule(given))
        for budget in sorted({plan.latency_ms for plan in schedules})[:: 1 if len(schedules) < 300 else 17]:
            fitting = [plan for plan in schedules if plan.latency_ms <= budget]
            best = min(plan.value(objective) for plan in fitting)
            found = dp.within(given, budget)
            assert found is not None and found.latency_ms <= budget
            assert found.value(objective) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_curve_is_the_pareto_front(case: dict[str, object]) -> None:
    given = problem(**case)  # type: ignore[arg-type]
    front = dp.pareto(given, points=10_000)
    assert all(a.latency_ms < b.latency_ms and a.cost > b.cost for a, b in pairwise(front))
    best, expected = np.inf, []
    for plan in sorted(every_schedule(given), key=lambda plan: (plan.latency_ms, plan.cost)):
        if plan.cost < best - 1e-12:
            best = plan.cost
            expected.append((plan.latency_ms, plan.cost))
    np.testing.assert_allclose([(plan.latency_ms, plan.cost) for plan in front], expected)


def test_the_figures_of_a_plan_are_its_own() -> None:
    given = problem(calls=8)
    known = {(plan.refreshes, plan.cuts): plan for plan in every_schedule(given)}
    for plan in dp.pareto(given):
        match = known[plan.refreshes, plan.cuts]
        assert (plan.cost, plan.peak, plan.latency_ms) == pytest.approx((match.cost, match.peak, match.latency_ms))


def test_lexicographic_needs_two_passes() -> None:
    """The better prefix in (maximum, sum) order loses once the last segment decides the maximum."""
    drift = np.zeros((1, 9, 4))
    drift[0, 0, 1], drift[0, 2, 1:3] = 1.0, (1.0, 1.0)  # full calls 0, 2: maximum 1, sum 3
    drift[0, 0, 1:3], drift[0, 3, 1] = (1.0, 1.0), 0.0
    drift[0, 0, 2] = 1.5  # full calls 0, 3: maximum 1.5, sum 2.5
    drift[0, 5, 1:] = 3.0
    given = dp.Problem(drift, np.ones(9), 4.0, np.ones(1), starts=frozenset({0, 2, 3, 5}), objective="lexicographic")
    first, second = (dp.evaluate(given, full, (0, 0, 0)) for full in ((0, 2, 5), (0, 3, 5)))
    assert first.peak == second.peak and second.cost < first.cost
    found = dp.within(given, second.latency_ms)
    assert found is not None and found.refreshes == (0, 3, 5)


@pytest.mark.parametrize("interval", [2, 3, 5, 10])
def test_never_worse_than_uniform_at_equal_count(interval: int) -> None:
    given = problem(calls=50, cuts=1, longest=10)
    plain = rules.uniform(50, interval)
    reference = dp.evaluate(given, plain, (0,) * len(plain))
    found = dp.within(given, reference.latency_ms)
    assert found is not None and found.cost <= reference.cost and len(found.refreshes) <= len(plain)


def test_a_dip_draws_the_refreshes() -> None:
    """Drift that grows fast around 40 % of the trajectory: planned cost well below uniform."""
    calls, longest = 50, 20
    speed = 0.2 + np.exp(-(((np.arange(calls) - 20) / 6) ** 2))
    travelled = np.concatenate([[0], np.cumsum(speed)])
    drift = np.array([[travelled[min(i + r, calls)] - travelled[i] for r in range(longest)] for i in range(calls)])[None]
    given = dp.Problem(drift, np.ones(calls), 10.0, np.array([1.0]))
    plain = rules.uniform(calls, 5)
    reference = dp.evaluate(given, plain, (0,) * 10)
    found = dp.within(given, reference.latency_ms)
    assert found is not None and found.cost < 0.87 * reference.cost
    assert sum(14 <= call <= 26 for call in found.refreshes) > sum(14 <= call <= 26 for call in plain)


def test_rounded_units_never_exceed_the_budget() -> None:
    """Latencies that are no whole units: the budget holds in real milliseconds, and little of it is left unused."""
    given = problem(calls=40, cuts=3, longest=8, full_ms=7.3, partial_ms=np.array([1.1, 2.37, 4.9]), unit_ms=None)
    everything = given.calls * given.full_ms
    for budget in np.linspace(0.35, 1, 14) * everything:
        found = dp.within(given, budget)
        assert found is not None and found.latency_ms <= budget * (1 + 1e-9)
        assert budget - found.latency_ms < 0.02 * everything or found.cost == 0


def test_nothing_fits() -> None:
    assert dp.within(problem(), 1.0) is None


def test_everything_fits() -> None:
    found = dp.within(problem(), np.inf)
    assert found is not None and found.cost == 0


def test_no_way_through() -> None:
    with pytest.raises(ValueError, match="no schedule satisfies"):
        dp.pareto(replace(problem(cuts=1), starts=frozenset({0})))


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"weights": np.ones(3)}, "does not fit"), ({"full_ms": 0.0}, "positive"), ({"weights": -np.ones(7)}, "negative")],
    ids=["shape", "latency", "sign"],
)
def test_bad_problems(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dp.pareto(problem(**fields))  # type: ignore[arg-type]


def test_unmeasured_drift_is_never_used() -> None:
    given = problem(cuts=1, calls=8)
    given.drift[0, :, 2:] = np.nan
    assert all(max(np.diff([*plan.refreshes, 8])) <= 2 for plan in dp.pareto(given))


def plainly(given: dp.Problem) -> np.ndarray:
    """[Q + 1] cheapest cost at most q units, in float64 over every segment of every cut: the search without its short cuts."""
    table, (units, _) = segments.segment_costs(given, "sum"), segments.latency_units(given)
    best = np.full((given.calls + 1, given.calls * int(units.max()) + 1), np.inf)
    best[0, 0] = 0.0
    for start in range(given.calls):
        for length in range(1, min(table.shape[2], given.calls - start + 1)):
            for cut in range(len(table)):
                spent = units[cut, length]
                into = best[start + length, spent:]
                np.minimum(into, best[start, : len(into)] + table[cut, start, length], out=into)
    return np.minimum.accumulate(best[-1])


LONG = {
    "no constraints": {},
    "forced at both ends": {"forced": frozenset({1, 2, 28, 29})},
    "steps of two calls": {"starts": frozenset(range(0, 30, 2))},
    "errors of many sizes": {"weights": 10.0 ** np.linspace(-6, 2, 30)},
    "partial calls that take longer than full ones": {"partial_ms": np.array([3.0, 30.0, 70.0, 100.0])},
}


@pytest.mark.parametrize("case", LONG.values(), ids=LONG)
def test_long_trajectories_are_searched_as_exactly_as_the_plain_way(case: dict[str, object]) -> None:
    """Two halves, fewer segments and float32 find what every segment in float64 finds, to the digits that float32 has."""
    given = problem(calls=30, cuts=4, longest=7, **case)  # type: ignore[arg-type]
    truth, searches = plainly(given), dp.searched(given)
    for budget in range(int(np.isfinite(truth).argmax()) - 1, 30 * 64 + 60, 23):
        found = dp.within(given, float(budget), searches)
        if not np.isfinite(truth[budget]):
            assert found is None
        else:
            assert found is not None and found.latency_ms <= budget
            assert found.cost == pytest.approx(truth[budget], rel=1e-6, abs=1e-6 * truth[np.isfinite(truth)].max())


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_short_front_is_complete_at_any_number_of_points(case: dict[str, object]) -> None:
    given = problem(**case)  # type: ignore[arg-type]
    every = dp.pareto(given, points=10_000)
    assert len(every) < 60
    assert dp.pareto(given, points=60) == every
    few = dp.pareto(given, points=5)
    assert 2 <= len(few) <= 5 and few[0] == every[0]


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_replaced_segments_are_no_loss(kind: segments.Kind) -> None:
    """What is left out has a replacement that is left in, and something is left out."""
    given = problem(calls=9, cuts=3, longest=5)
    table, (units, _) = segments.segment_costs(given, kind), segments.latency_units(given)
    kept = segments.worthwhile(table, units, kind)
    gone = np.argwhere(np.isfinite(table) & np.isinf(kept))
    assert len(gone) > 20
    for cut, start, length in gone:
        costs = np.full((length + 1, units.max() * length + 1), np.inf)
        costs[0, 0] = 0.0
        for a in range(length):
            for b in range(a + 1, length + 1):
                for other in range(3):
                    into = costs[b, units[other, b - a] :]
                    np.minimum(into, segments.JOIN[kind](costs[a, : len(into)], kept[other, start + a, b - a]), out=into)
        assert costs[-1, : units[cut, length] + 1].min() <= table[cut, start, length]
