"""Exact schedule search over step x cut (caching spec 4.4): pure arrays, neither torch nor diffusers.

A trajectory is cut into segments: a full call i and the partial calls up to the next full call j, all reusing one cut b. The cost of a
segment adds up (or takes the largest of) weight x drift of its partial calls; its latency is L_full + (j - i - 1) L_b.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Objective = Literal["sum", "minimax", "lexicographic"]
Kind = Literal["sum", "max"]

MAX_UNITS = 8192
"""Latency units of a whole trajectory: bounds time and memory of the search over several cuts."""
UNITS_OF_SMALLEST = 64
CURVE_POINTS = 40


@dataclass(frozen=True)
class Problem:
    """What a schedule is chosen from.

    Attributes:
        drift: [B, n, W] drift[b, i, r] = error of call i + r when it reuses cut b of call i; r = 0 is 0. Entries past the end are ignored.
            W is the longest segment.
        weights: [n] effect of an error at each call on the result.
        full_ms: latency of a full call.
        partial_ms: [B] latency of a partial call.
        forced: calls that must be full.
        starts: calls that may be full; None = all. Call 0 and forced calls always may.
        objective: sum | minimax | lexicographic (smallest maximum first, then smallest sum).
        mixed: segments may use different cuts; False = one cut for the whole trajectory.
        unit_ms: of the latency grid of mixed cuts; None = chosen by `latency_units`.
    """

    drift: np.ndarray
    weights: np.ndarray
    full_ms: float
    partial_ms: np.ndarray
    forced: frozenset[int] = frozenset()
    starts: frozenset[int] | None = None
    objective: Objective = "sum"
    mixed: bool = True
    unit_ms: float | None = None

    @property
    def calls(self) -> int:
        return int(self.drift.shape[1])


@dataclass(frozen=True)
class Plan:
    """One schedule.

    Attributes:
        refreshes: full calls, ascending.
        cuts: index of the cut that the segment of each full call uses.
        cost: sum of weight x drift over all partial calls.
        peak: the largest of them.
        latency_ms: as it is, nothing rounded.
    """

    refreshes: tuple[int, ...]
    cuts: tuple[int, ...]
    cost: float
    peak: float
    latency_ms: float

    def value(self, objective: Objective) -> tuple[float, ...]:
        """What the objective minimises."""
        return {"sum": (self.cost,), "minimax": (self.peak,), "lexicographic": (self.peak, self.cost)}[objective]


def pareto(problem: Problem, points: int = CURVE_POINTS, searches: Searches | None = None) -> list[Plan]:
    """Non-dominated schedules by growing latency and strictly better objective: "at most this latency", one search for all.

    Args:
        points: at most this many budgets are traced back, evenly over those where the objective improves.
        searches: of the problem, where it was searched already.

    Raises:
        ValueError: no schedule satisfies the constraints, or shapes disagree.
    """
    found = _candidates(searches or searched(problem))
    if len(found) > points:
        found = [found[i] for i in np.unique(np.round(np.linspace(0, len(found) - 1, points)).astype(int))]
    budgets: dict[int, tuple[_Search, list[int]]] = {}
    for _, _, search, q in found:
        budgets.setdefault(id(search), (search, []))[1].append(q)
    plans = [plan for search, chosen in budgets.values() for plan in search.traces(chosen)]
    if problem.objective == "lexicographic":
        plans = [_refined(problem, plan, plan.latency_ms) for plan in plans]
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.latency_ms, plan.value(problem.objective))):
        if not front or plan.value(problem.objective) < front[-1].value(problem.objective):
            front.append(plan)
    if not front:
        raise ValueError("no schedule satisfies the constraints: the drift matrix has no finite path through the trajectory")
    return front


def within(problem: Problem, latency_ms: float, searches: Searches | None = None) -> Plan | None:
    """The best schedule that takes at most `latency_ms`; None = every schedule takes longer. `searches`: as `pareto` takes them."""
    found = [item for item in _candidates(searches or searched(problem)) if item[0] <= latency_ms * (1 + 1e-12)]
    if not found:
        return None
    _, _, search, q = min(found, key=lambda item: item[1])
    best = search.stretched(q, latency_ms)
    return _refined(problem, best, latency_ms) if problem.objective == "lexicographic" else best


def _candidates(searches: Searches) -> list[tuple[float, float, _Search, int]]:
    """(latency or its bound, cost, search, budget) of all searches, non-dominated, by latency."""
    points = [(*point, search) for search in searches for point in search.points()]
    front: list[tuple[float, float, _Search, int]] = []
    for latency, cost, q, search in sorted(points, key=lambda point: point[:2]):
        if not front or cost < front[-1][1]:
            front.append((latency, cost, search, q))
    return front


def _refined(problem: Problem, plan: Plan, latency_ms: float) -> Plan:
    """Second pass of the lexicographic objective: the smallest sum among segments that stay below the smallest maximum.

    One pass over (maximum, sum) pairs is not optimal: a prefix with a smaller maximum and a larger sum can lose later.
    """
    bounded = np.where(segment_costs(problem, "max") <= plan.peak, segment_costs(problem, "sum"), np.inf)
    found = [item for item in _candidates(searched(replace(problem, objective="sum"), bounded)) if item[0] <= latency_ms * (1 + 1e-12)]
    if not found:
        return plan
    _, _, search, q = min(found, key=lambda item: item[1])
    return search.stretched(q, latency_ms)


def evaluate(problem: Problem, refreshes: tuple[int, ...], cuts: tuple[int, ...]) -> Plan:
    """Figures of a given schedule; cost and peak are infinite where it breaks a constraint or leaves the drift matrix."""
    full = np.asarray(refreshes)
    calls = np.arange(problem.calls)
    segment = np.searchsorted(full, calls, side="right") - 1
    lag, cut = calls - full[segment], np.asarray(cuts)[segment]
    partial = np.flatnonzero(lag)
    reached = lag < problem.drift.shape[2]
    drift = np.where(reached, problem.drift[cut, full[segment], np.where(reached, lag, 0)], np.inf)
    errors = problem.weights[partial] * drift[partial]
    errors[np.isnan(errors)] = np.inf
    if not problem.forced.isdisjoint(partial.tolist()):
        errors = np.append(errors, np.inf)
    latency = len(full) * problem.full_ms + float(problem.partial_ms[cut[partial]].sum())
    return Plan(tuple(refreshes), tuple(cuts), float(errors.sum()), float(errors.max(initial=0.0)), latency)


def segment_costs(problem: Problem, kind: Kind) -> np.ndarray:
    """[B, n, W + 1] cost of the segment of each length 1..W that begins at each call; inf = not allowed, index 0 is unused."""
    cuts, calls, longest = problem.drift.shape
    reach = np.arange(calls)[:, None] + np.arange(longest)
    weight: np.ndarray = np.append(problem.weights, 0.0).astype(np.float64)
    weight[list(problem.forced)] = np.inf
    with np.errstate(invalid="ignore"):
        weighted = problem.drift * weight[np.minimum(reach, calls)]
    weighted = np.where(np.isnan(weighted), np.inf, weighted)
    weighted[:, :, 0] = 0.0
    joined = np.cumsum(weighted, axis=2) if kind == "sum" else np.maximum.accumulate(weighted, axis=2)
    table = np.full((cuts, calls, longest + 1), np.inf)
    table[:, :, 1:] = np.where(reach < calls, joined, np.inf)
    if problem.starts is not None:
        closed = [call for call in range(1, calls) if call not in problem.starts and call not in problem.forced]
        table[:, closed] = np.inf
    return table


@dataclass(frozen=True)
class _Search:
    """One finished dynamic programme over a budget axis q (full calls, or latency units).

    Attributes:
        problem: with the cuts that this search may mix.
        index: their indices in the caller's problem.
        table: [B, n, W + 1] segment costs; `units`: [B, W + 1] budget of a segment.
        best: [n + 1, Q + 1] cheapest way to cover calls 0..j-1 with exactly budget q.
        kind: how costs join.
        unit_ms: None = q counts full calls.
        back: [n + 1, Q + 1] start of the last segment; None = found again from `best`.
    """

    problem: Problem
    index: tuple[int, ...]
    table: np.ndarray
    units: np.ndarray
    best: np.ndarray
    kind: Kind
    unit_ms: float | None
    back: np.ndarray | None = None

    def points(self) -> list[tuple[float, float, int]]:
        """(latency, cost, budget) where the cheapest cost at most q falls; latency is a bound where segments are rounded up."""
        last = self.best[-1]
        falls = np.flatnonzero(last < np.minimum.accumulate(np.concatenate([[np.inf], last[:-1]])))
        partial = float(self.problem.partial_ms[0])
        latency = falls * self.problem.full_ms + (self.problem.calls - falls) * partial if self.unit_ms is None else falls * self.unit_ms
        return list(zip(latency.tolist(), last[falls].tolist(), falls.tolist(), strict=True))

    def stretched(self, q: int, latency_ms: float) -> Plan:
        """The plan of budget q, or a better one of a larger budget that still takes at most `latency_ms`.

        Units round every segment up, so plans leave time unused.
        """
        best = self.trace(q)
        if self.unit_ms is None:
            return best
        budgets: np.ndarray = np.array([budget for _, _, budget in self.points()])
        while len(larger := budgets[(budgets > q) & (budgets <= q + (latency_ms - best.latency_ms) / self.unit_ms)]):
            q = int(larger[-1])
            plan = self.trace(q)
            if plan.latency_ms > latency_ms * (1 + 1e-12):
                break
            best = plan
        return best

    def trace(self, q: int) -> Plan:
        """The plan of budget q."""
        return self.traces([q])[0]

    def traces(self, budgets: list[int]) -> list[Plan]:
        """Walk back from the end, all budgets side by side. Ties: smallest start, then smallest cut."""
        ends, left = np.full(len(budgets), self.problem.calls), np.array(budgets)
        paths: list[list[tuple[int, int]]] = [[] for _ in budgets]
        while len(going := np.flatnonzero(ends)):
            starts, cuts = self._steps(ends[going], left[going])
            left[going] -= self.units[cuts, ends[going] - starts]
            ends[going] = starts
            for path, start, cut in zip(going.tolist(), starts.tolist(), cuts.tolist(), strict=True):
                paths[path].append((start, cut))
        plans = []
        for path in paths:
            refreshes, chosen = zip(*path[::-1], strict=True)
            plans.append(replace(evaluate(self.problem, refreshes, chosen), cuts=tuple(self.index[cut] for cut in chosen)))
        return plans

    def _steps(self, ends: np.ndarray, budgets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[P] start and cut of the segment that ends at each of `ends` in the cheapest cover with its budget."""
        if self.back is not None:
            return self.back[ends, budgets], np.zeros_like(ends)
        lengths = np.arange(self.table.shape[2] - 1, 0, -1)
        starts = ends[:, None] - lengths  # [P, W]
        before = budgets[:, None, None] - self.units[:, lengths].T  # [P, W, B]
        open_ = (starts >= 0)[:, :, None] & (before >= 0)
        starts = np.maximum(starts, 0)
        value = self.best[starts[:, :, None], np.where(open_, before, 0)]
        step = np.moveaxis(self.table[:, starts, lengths], 0, -1)
        joined = value + step if self.kind == "sum" else np.maximum(value, step)
        chosen = (open_ & (joined == self.best[ends, budgets][:, None, None])).reshape(len(ends), -1).argmax(axis=1)
        place, cut = np.divmod(chosen, len(self.index))
        return ends - lengths[place], cut


Searches = list[_Search]
"""The finished dynamic programmes of one problem."""


def searched(problem: Problem, table: np.ndarray | None = None) -> Searches:
    """The dynamic programmes that answer a problem: one over all cuts, or one per cut. `table`: segment costs; None = the objective's.

    The lexicographic objective begins with its first pass, the smallest maximum.
    """
    _check(problem)
    cuts = range(problem.drift.shape[0])
    kind: Kind = "sum" if problem.objective == "sum" else "max"
    table = segment_costs(problem, kind) if table is None else table
    if problem.mixed and len(cuts) > 1:
        units, unit_ms = latency_units(problem)
        table = _undominated(table, units)
        return [_Search(problem, tuple(cuts), table, units, forward(table, units, kind), kind, unit_ms)]
    units = np.ones((1, table.shape[2]), np.int64)
    lanes, starts = forward_each(table, kind)
    single = [replace(problem, drift=problem.drift[b : b + 1], partial_ms=problem.partial_ms[b : b + 1]) for b in cuts]
    return [_Search(single[b], (b,), table[b : b + 1], units, lanes[b], kind, None, starts[b]) for b in cuts]


def _check(problem: Problem) -> None:
    cuts, calls, longest = problem.drift.shape
    if problem.weights.shape != (calls,) or problem.partial_ms.shape != (cuts,) or longest < 1:
        raise ValueError(
            f"drift {problem.drift.shape} does not fit weights {problem.weights.shape} and partial_ms {problem.partial_ms.shape}"
        )
    if problem.full_ms <= 0 or not (problem.partial_ms > 0).all():
        raise ValueError("latencies must be positive")
    if (problem.drift < 0).any() or (problem.weights < 0).any():
        raise ValueError("drift and weights must not be negative")


def latency_units(problem: Problem) -> tuple[np.ndarray, float]:
    """([B, W + 1] latency of each segment in whole units, rounded up; unit in ms)."""
    smallest = min(problem.full_ms, float(problem.partial_ms.min()))
    unit = problem.unit_ms or max(smallest / UNITS_OF_SMALLEST, problem.calls * problem.full_ms / MAX_UNITS)
    lengths = np.arange(problem.drift.shape[2] + 1)
    latency = problem.full_ms + np.maximum(lengths - 1, 0)[None] * problem.partial_ms[:, None]
    return np.ceil(latency / unit - 1e-9).astype(np.int64), unit


def _undominated(table: np.ndarray, units: np.ndarray) -> np.ndarray:
    """The table without segments for which another cut is neither slower nor worse, and smaller or better in one."""
    kept = table.copy()
    for one in range(len(table)):
        for other in range(len(table)):
            if other != one:
                better = (units[other] < units[one]) | (table[other] < table[one]) | (other < one)
                kept[one][(units[other] <= units[one]) & (table[other] <= table[one]) & better] = np.inf
    return kept


def forward(table: np.ndarray, units: np.ndarray, kind: Kind) -> np.ndarray:
    """[n + 1, Q + 1] cheapest cover of the first j calls with exactly q units, over all segments and cuts."""
    calls, longest = table.shape[1], table.shape[2] - 1
    size = calls * int(units[:, 1].max())
    best = np.full((calls + 1, size + 1), np.inf)
    best[0, 0] = 0.0
    low, high = [size + 1] * (calls + 1), [-1] * (calls + 1)  # budgets that are reachable at all
    low[0] = high[0] = 0
    join = np.add if kind == "sum" else np.maximum
    scratch = np.empty(size + 1)
    spent, costs = units.tolist(), table.tolist()
    open_cuts = [[np.flatnonzero(row).tolist() for row in np.isfinite(table[:, i]).T] for i in range(calls)]
    for j in range(1, calls + 1):
        row = best[j]
        for i in range(max(j - longest, 0), j):
            length, before, reach = j - i, best[i, low[i] : high[i] + 1], high[i] - low[i] + 1
            for cut in open_cuts[i][length]:
                first = low[i] + spent[cut][length]
                last = min(first + reach, size + 1)
                if first < last:
                    part = join(before[: last - first], costs[cut][i][length], out=scratch[: last - first])
                    into = row[first:last]
                    np.minimum(into, part, out=into)
                    low[j], high[j] = min(low[j], first), max(high[j], last - 1)
    return best


def forward_each(table: np.ndarray, kind: Kind) -> tuple[np.ndarray, np.ndarray]:
    """Every cut alone, all numbers of full calls in one pass.

    Returns:
        best: [B, n + 1, n + 1] cheapest cover of the first j calls with exactly k full calls.
        back: same shape, start of its last segment.
    """
    cuts, calls, longest = table.shape[0], table.shape[1], table.shape[2] - 1
    best = np.full((cuts, calls + 1, calls + 1), np.inf)
    best[:, 0, 0] = 0.0
    back = np.zeros(best.shape, np.int32)
    join = np.add if kind == "sum" else np.maximum
    for j in range(1, calls + 1):
        starts = np.arange(max(j - longest, 0), j)
        # the first i calls hold at most i segments, so budgets from j on are unreachable
        joined = join(best[:, starts[0] : j, :j], table[:, starts, j - starts][:, :, None])
        chosen = joined.argmin(axis=1)
        best[:, j, 1 : j + 1] = np.take_along_axis(joined, chosen[:, None], axis=1)[:, 0]
        back[:, j, 1 : j + 1] = chosen + starts[0]
    return best, back
