"""The dynamic programme over budgets of time: the cheapest way to cover the first calls, for every call and every number of units."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from qdm_cli.engine.caching.segments import JOIN, Kind

_FAR = 1 << 40  # a budget beyond all others


@dataclass(frozen=True)
class Segments:
    """[S] segments by start, then cut.

    Attributes:
        starts, ends: first call, and the one behind the last.
        cuts: that partial calls reuse.
        units: time.
        costs: float32, the largest is 1: the search compares plans by 6 digits, drift is measured with fewer; plans are evaluated in
            float64 once found.
    """

    starts: np.ndarray
    ends: np.ndarray
    cuts: np.ndarray
    units: np.ndarray
    costs: np.ndarray

    @classmethod
    def of(cls, table: np.ndarray, units: np.ndarray) -> Segments:
        """Those with a finite cost. table: [B, n, W + 1]; units: [B, W + 1]."""
        starts, cuts, lengths = np.nonzero(np.isfinite(table.swapaxes(0, 1)))
        costs = table[cuts, starts, lengths]
        scale = costs.max(initial=0.0) or 1.0
        return cls(starts, starts + lengths, cuts, units[cuts, lengths], (costs / scale).astype(np.float32))

    def where(self, chosen: np.ndarray) -> Segments:
        """Those that an index array or mask selects."""
        return Segments(*(part[chosen] for part in (self.starts, self.ends, self.cuts, self.units, self.costs)))

    def mirrored(self, calls: int) -> Segments:
        """The same trajectory from its end."""
        order = np.lexsort((self.cuts, -self.ends))
        found = self.where(order)
        return Segments(calls - found.ends, calls - found.starts, found.cuts, found.units, found.costs)


@dataclass(frozen=True)
class Cover:
    """Cheapest covers of the first 0, 1, .. calls.

    Attributes:
        segments: that it is made of; kind: how their costs join.
        best: [rows, margin + width] float32, best[j, margin + q] = cost of the first j calls with exactly q units; inf = impossible.
        margin: columns of inf at the left, so that no budget is looked up below 0.
        low, high: [rows] smallest and largest possible number of units.
    """

    segments: Segments
    kind: Kind
    best: np.ndarray
    margin: int
    low: np.ndarray
    high: np.ndarray

    def lines(self, rows: np.ndarray) -> np.ndarray:
        """[R, width] costs of rows, by units."""
        return self.best[rows, self.margin :]

    def walked(self, rows: np.ndarray, budgets: np.ndarray) -> list[list[int]]:
        """Segments of the cheapest covers of `rows` calls with `budgets` units, from the last to the first; all paths side by side."""
        flat, line = self.best.reshape(-1), self.best.shape[1]
        into, place, costs = self._into
        rows, budgets = rows.copy(), budgets.copy()
        paths: list[list[int]] = [[] for _ in rows]
        while len(going := np.flatnonzero(rows)):
            row, budget = rows[going], budgets[going]
            values = JOIN[self.kind](flat.take(place[row] + budget[:, None]), costs[row])
            found = (values == flat[row * line + self.margin + budget][:, None]).argmax(axis=1)
            taken = into[row, found]
            rows[going] = self.segments.starts[taken]
            budgets[going] -= self.segments.units[taken]
            for path, segment in zip(going.tolist(), taken.tolist(), strict=True):
                paths[path].append(segment)
        return paths

    @cached_property
    def _into(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """[rows, M] of the segments that end at each row: which, where in `best` they begin with budget 0, cost (inf fills up)."""
        own, rows = self.segments, len(self.best)
        order = np.lexsort((own.cuts, own.starts, own.ends))
        counts = np.bincount(own.ends, minlength=rows)
        at = own.ends[order], np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
        into, place = np.zeros((2, rows, counts.max(initial=0)), np.int64)
        costs = np.full(into.shape, np.inf, np.float32)
        into[at], costs[at] = order, own.costs[order]
        place[at] = own.starts[order] * self.best.shape[1] + self.margin - own.units[order]
        return into, place, costs


def cover(segments: Segments, rows: int, kind: Kind) -> Cover:
    """Cover the first 0 .. rows - 1 calls."""
    low, high = _reach(segments, rows)
    margin = int(segments.units.max(initial=0))
    best: np.ndarray = np.full((rows, margin + int(high.max()) + 1), np.inf, np.float32)
    best[0, margin] = 0.0
    bounds = _bounds(segments, rows)
    scratch = np.empty((np.bincount(segments.starts).max(initial=0), best.shape[1]), np.float32)
    ends, lines = segments.ends.tolist(), list(best)
    places = (margin + low[segments.starts] + segments.units).tolist()
    for start, line in enumerate(lines):
        begin, end = bounds[start : start + 2]
        size = int(high[start] - low[start]) + 1
        if begin == end or size < 1:
            continue
        before = line[margin + low[start] : margin + high[start] + 1]
        parts = JOIN[kind](before, segments.costs[begin:end, None], out=scratch[: end - begin, :size])
        for row, place, part in zip(ends[begin:end], places[begin:end], parts, strict=True):
            into = lines[row][place : place + size]
            np.minimum(into, part, out=into)
    return Cover(segments, kind, best, margin, low, high)


def _reach(segments: Segments, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """[rows] smallest and largest number of units in which the first calls can be covered; the largest is below 0 where none can."""
    low, high = np.full(rows, _FAR), np.full(rows, -_FAR)
    low[0] = high[0] = 0
    bounds = _bounds(segments, rows)
    for start in range(rows):
        own = slice(bounds[start], bounds[start + 1])
        np.minimum.at(low, segments.ends[own], low[start] + segments.units[own])
        np.maximum.at(high, segments.ends[own], high[start] + segments.units[own])
    return low, high


def _bounds(segments: Segments, rows: int) -> list[int]:
    """[rows + 1] where the segments of each start begin."""
    return [0, *np.cumsum(np.bincount(segments.starts, minlength=rows)).tolist()]
