"""Exact schedule search over step x cut (caching spec 4.4): pure arrays, neither torch nor diffusers.

One cut for the whole trajectory is searched by the number of full calls; segments of different cuts by time in whole units, from both ends
of the trajectory to its middle: the tables of two halves hold half as many budgets as that of the whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import Any, Protocol

import numpy as np

from qdm_cli.engine.caching.cover import Cover, Segments, cover
from qdm_cli.engine.caching.segments import JOIN, Kind, Objective, Plan, Problem, evaluate, latency_units, segment_costs, worthwhile

__all__ = ["Objective", "Plan", "Problem", "Searches", "evaluate", "pareto", "searched", "within"]

CURVE_POINTS = 40
_SLACK = 1 + 1e-12  # of latencies that were added up in another order


@dataclass(frozen=True)
class Point:
    """One budget of a finished search.

    Attributes:
        latency_ms: a bound of its plan's latency.
        cost: comparable within the searches of one problem.
        key: what the search finds the plan again by.
    """

    latency_ms: float
    cost: float
    key: Any


class Search(Protocol):
    """A finished dynamic programme."""

    def points(self, count: int) -> list[Point]:
        """By growing latency and falling cost; all of them, or `count` if that saves time."""

    def best(self, latency_ms: float) -> Point | None:
        """The cheapest within a time; None = every schedule takes longer."""

    def plans(self, points: Sequence[Point]) -> list[Plan]:
        """Their schedules."""

    def stretched(self, point: Point, latency_ms: float) -> Plan:
        """The plan of a point, or a better one that still takes at most `latency_ms`."""


Searches = Sequence[Search]
"""The finished dynamic programmes of one problem."""


def pareto(problem: Problem, points: int = CURVE_POINTS, searches: Searches | None = None) -> list[Plan]:
    """Non-dominated schedules by growing latency and strictly better objective: "at most this latency", one search for all.

    Args:
        points: at most this many, evenly over the budgets where there are more.
        searches: of the problem, where it was searched already.

    Raises:
        ValueError: no schedule satisfies the constraints, or shapes disagree.
    """
    found = [(point, search) for search in searches or searched(problem) for point in search.points(points)]
    found = _evenly(_front(found), points)
    plans = [plan for search in {id(search): search for _, search in found}.values() for plan in _plans_of(search, found)]
    if problem.objective == "lexicographic":
        plans = [_refined(problem, plan, plan.latency_ms) for plan in plans]
    front: list[Plan] = []
    for plan in sorted(plans, key=lambda plan: (plan.latency_ms, plan.value(problem.objective))):
        if not front or plan.value(problem.objective) < front[-1].value(problem.objective):
            front.append(plan)
    if not front:
        raise ValueError("no schedule satisfies the constraints: the drift matrix has no finite path through the trajectory")
    return front


def _front(found: list[tuple[Point, Search]]) -> list[tuple[Point, Search]]:
    """Those that no other is both faster and cheaper than, by latency."""
    found = sorted(found, key=lambda item: (item[0].latency_ms, item[0].cost))
    costs = np.array([point.cost for point, _ in found])
    falls = np.flatnonzero(costs < np.minimum.accumulate(np.append(np.inf, costs))[:-1])
    return [found[place] for place in falls]


def _evenly(found: list[tuple[Point, Search]], count: int) -> list[tuple[Point, Search]]:
    if len(found) <= count:
        return found
    return [found[place] for place in np.unique(np.round(np.linspace(0, len(found) - 1, count)).astype(int))]


def _plans_of(search: Search, found: list[tuple[Point, Search]]) -> list[Plan]:
    return search.plans([point for point, owner in found if owner is search])


def within(problem: Problem, latency_ms: float, searches: Searches | None = None) -> Plan | None:
    """The best schedule that takes at most `latency_ms`; None = every schedule takes longer. `searches`: as `pareto` takes them."""
    best = _best(searches or searched(problem), latency_ms)
    return _refined(problem, best, latency_ms) if best is not None and problem.objective == "lexicographic" else best


def _best(searches: Searches, latency_ms: float) -> Plan | None:
    found = [(point, search) for search in searches if (point := search.best(latency_ms)) is not None]
    if not found:
        return None
    point, search = min(found, key=lambda item: (item[0].cost, item[0].latency_ms))
    return search.stretched(point, latency_ms)


def _refined(problem: Problem, plan: Plan, latency_ms: float) -> Plan:
    """Second pass of the lexicographic objective: the smallest sum among segments that stay below the smallest maximum.

    One pass over (maximum, sum) pairs is not optimal: a prefix with a smaller maximum and a larger sum can lose later.
    """
    bounded = np.where(segment_costs(problem, "max") <= plan.peak, segment_costs(problem, "sum"), np.inf)
    return _best(searched(replace(problem, objective="sum"), bounded), latency_ms) or plan


def searched(problem: Problem, table: np.ndarray | None = None) -> Searches:
    """The dynamic programmes that answer a problem: one over all cuts, or one per cut. `table`: segment costs; None = the objective's.

    The lexicographic objective begins with its first pass, the smallest maximum.
    """
    problem.check()
    cuts = range(problem.drift.shape[0])
    kind: Kind = "sum" if problem.objective == "sum" else "max"
    table = segment_costs(problem, kind) if table is None else table
    if problem.mixed and len(cuts) > 1:
        return [Mixed.of(problem, table, kind)]
    best, back = forward_each(table, kind)
    return [OneCut(problem, b, best[b], back[b]) for b in cuts]


@dataclass(frozen=True)
class OneCut:
    """All numbers of full calls of one cut.

    Attributes:
        cut: its index.
        costs: [n + 1, n + 1] cheapest cover of the first j calls with exactly k full calls.
        back: same shape, start of its last segment.
    """

    problem: Problem
    cut: int
    costs: np.ndarray
    back: np.ndarray

    def points(self, count: int) -> list[Point]:
        last = self.costs[-1]
        falls = np.flatnonzero(last < np.minimum.accumulate(np.append(np.inf, last))[:-1])
        partial = float(self.problem.partial_ms[self.cut])
        latency = falls * self.problem.full_ms + (self.problem.calls - falls) * partial
        return [Point(*point) for point in zip(latency.tolist(), last[falls].tolist(), falls.tolist(), strict=True)]

    def best(self, latency_ms: float) -> Point | None:
        return next((point for point in reversed(self.points(0)) if point.latency_ms <= latency_ms * _SLACK), None)

    def plans(self, points: Sequence[Point]) -> list[Plan]:
        return [self._plan(point.key) for point in points]

    def _plan(self, full: int) -> Plan:
        refreshes: list[int] = []
        end = self.problem.calls
        for count in range(full, 0, -1):
            end = int(self.back[end, count])
            refreshes.append(end)
        return evaluate(self.problem, tuple(refreshes[::-1]), (self.cut,) * full)

    def stretched(self, point: Point, latency_ms: float) -> Plan:
        return self._plan(point.key)


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
    for j in range(1, calls + 1):
        starts = np.arange(max(j - longest, 0), j)
        # the first i calls hold at most i segments, so budgets from j on are unreachable
        joined = JOIN[kind](best[:, starts[0] : j, :j], table[:, starts, j - starts][:, :, None])
        chosen = joined.argmin(axis=1)
        best[:, j, 1 : j + 1] = np.take_along_axis(joined, chosen[:, None], axis=1)[:, 0]
        back[:, j, 1 : j + 1] = chosen + starts[0]
    return best, back


@dataclass(frozen=True)
class Crossing:
    """Where a plan passes from the first half to the second: the row of the cover of either half, and the units spent there."""

    rows: tuple[int, int]
    units: tuple[int, int]


@dataclass(frozen=True)
class Mixed:
    """All cuts, by time in units.

    Attributes:
        ahead: covers up to the first full call from `middle` on, which is at most one segment behind it.
        behind: covers of the rest, of the mirrored trajectory.
    """

    problem: Problem
    unit_ms: float
    middle: int
    ahead: Cover
    behind: Cover

    @classmethod
    def of(cls, problem: Problem, table: np.ndarray, kind: Kind) -> Mixed:
        """Search. table: [B, n, W + 1] segment costs."""
        units, unit_ms = latency_units(problem)
        segments = Segments.of(worthwhile(table, units, kind), units)
        calls, middle = problem.calls, problem.calls // 2
        early = segments.starts < middle
        ahead = cover(segments.where(early), min(middle + table.shape[2] - 1, calls + 1), kind)
        return cls(problem, unit_ms, middle, ahead, cover(segments.where(~early).mirrored(calls), calls - middle + 1, kind))

    @cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """([J, Q] costs ahead of each call where the halves may meet, with at most q units; [J, R] behind it; the same, units falling)."""
        rows = np.arange(self.middle, len(self.ahead.best))
        ahead = np.minimum.accumulate(self.ahead.lines(rows), axis=1)
        behind = np.minimum.accumulate(self.behind.lines(self.problem.calls - rows), axis=1)
        return ahead, behind, behind[:, ::-1].copy()

    def _cheapest(self, budget: int) -> Point | None:
        """With at most `budget` units; None = impossible."""
        ahead, behind, falling = self._halves
        size, rest = ahead.shape[1], behind.shape[1]
        budget = min(budget, size + rest - 2)
        first, end = max(0, budget - rest + 1), min(size, budget + 1)
        if end <= first:
            return None
        shift = rest - 1 - budget
        joined = JOIN[self.ahead.kind](ahead[:, first:end], falling[:, first + shift : end + shift])
        place, column = divmod(int(joined.argmin()), end - first)
        if not np.isfinite(cost := float(joined[place, column])):
            return None
        spent = _first(ahead[place], first + column), _first(behind[place], budget - first - column)
        row = self.middle + place
        return Point(sum(spent) * self.unit_ms, cost, Crossing((row, self.problem.calls - row), spent))

    def points(self, count: int) -> list[Point]:
        least, most = self._range()
        sampled = self._falling(np.unique(np.round(np.linspace(least, most, count)).astype(int)).tolist()) if most >= least else []
        if len(sampled) == count:
            return sampled
        every = list(islice(self._descending(most), count))
        return every[::-1] if len(every) < count else sampled

    def _range(self) -> tuple[int, int]:
        """Smallest and largest possible budget; the largest is smaller where there is none."""
        rows = np.arange(self.middle, len(self.ahead.best))
        rest: np.ndarray = self.problem.calls - rows
        return int((self.ahead.low[rows] + self.behind.low[rest]).min()), int((self.ahead.high[rows] + self.behind.high[rest]).max())

    def _falling(self, budgets: Iterable[int]) -> list[Point]:
        found: list[Point] = []
        for budget in budgets:
            point = self._cheapest(budget)
            if point is not None and (not found or point.cost < found[-1].cost):
                found.append(point)
        return found

    def _descending(self, budget: int) -> Iterator[Point]:
        """Every budget where the cost falls, from the largest down."""
        point = self._cheapest(budget)
        while point is not None:
            below = self._cheapest(sum(point.key.units) - 1)
            if below is None or below.cost > point.cost:
                yield point
            point = below

    def best(self, latency_ms: float) -> Point | None:
        return self._cheapest(self._units(latency_ms * _SLACK))

    def _units(self, latency_ms: float) -> int:
        """Whole units in a time, at most those of the slowest plan."""
        return int(min(latency_ms / self.unit_ms + 1e-9, self._range()[1]))

    def stretched(self, point: Point, latency_ms: float) -> Plan:
        """As `Search.stretched`: units round every segment up, so plans leave time unused."""
        (plan,) = self.plans([point])
        while True:
            larger = self._cheapest(sum(point.key.units) + self._units(latency_ms - plan.latency_ms))
            if larger is None or larger.cost >= point.cost:
                return plan
            (other,) = self.plans([larger])
            if other.latency_ms > latency_ms * _SLACK:
                return plan
            point, plan = larger, other

    def plans(self, points: Sequence[Point]) -> list[Plan]:
        rows, units = (np.array([getattr(point.key, name) for point in points]).reshape(-1, 2).T for name in ("rows", "units"))
        ahead, behind = (half.walked(*place) for half, *place in zip((self.ahead, self.behind), rows, units, strict=True))
        return [self._plan(*paths) for paths in zip(ahead, behind, strict=True)]

    def _plan(self, ahead: list[int], behind: list[int]) -> Plan:
        first, second = self.ahead.segments, self.behind.segments
        starts = np.concatenate([first.starts[ahead[::-1]], self.problem.calls - second.ends[behind]])
        cuts = np.concatenate([first.cuts[ahead[::-1]], second.cuts[behind]])
        return evaluate(self.problem, tuple(starts.tolist()), tuple(cuts.tolist()))


def _first(falling: np.ndarray, column: int) -> int:
    """The first column with the value of `column`."""
    return int((falling <= falling[column]).argmax())
