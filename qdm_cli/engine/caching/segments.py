"""What a schedule is chosen from and made of: the search problem, its segments with their costs, and finished plans. Pure arrays.

A trajectory is cut into segments: a full call i and the partial calls up to the next full call j, all reusing one cut b. The cost of a
segment adds up (or takes the largest of) weight x drift of its partial calls; its latency is L_full + (j - i - 1) L_b.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

Objective = Literal["sum", "minimax", "lexicographic"]
Kind = Literal["sum", "max"]
JOIN: dict[Kind, Any] = {"sum": np.add, "max": np.maximum}
"""How the costs of two segments become one."""

MAX_UNITS = 8192
"""Latency units of a whole trajectory: bounds time and memory of the search over several cuts."""
UNITS_OF_SMALLEST = 64


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

    def check(self) -> None:
        """
        Raises:
            ValueError: shapes disagree, or a figure is out of range.
        """
        cuts, calls, longest = self.drift.shape
        if self.weights.shape != (calls,) or self.partial_ms.shape != (cuts,) or longest < 1:
            raise ValueError(f"drift {self.drift.shape} does not fit weights {self.weights.shape} and partial_ms {self.partial_ms.shape}")
        if self.full_ms <= 0 or not (self.partial_ms > 0).all():
            raise ValueError("latencies must be positive")
        if (self.drift < 0).any() or (self.weights < 0).any():
            raise ValueError("drift and weights must not be negative")


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
    table = np.full((cuts, calls, longest + 1), np.inf)
    table[:, :, 1:] = np.where(reach < calls, JOIN[kind].accumulate(weighted, axis=2), np.inf)
    if problem.starts is not None:
        closed = [call for call in range(1, calls) if call not in problem.starts and call not in problem.forced]
        table[:, closed] = np.inf
    return table


def latency_units(problem: Problem) -> tuple[np.ndarray, float]:
    """([B, W + 1] latency of each segment in whole units, rounded up; unit in ms)."""
    smallest = min(problem.full_ms, float(problem.partial_ms.min()))
    unit = problem.unit_ms or max(smallest / UNITS_OF_SMALLEST, problem.calls * problem.full_ms / MAX_UNITS)
    lengths = np.arange(problem.drift.shape[2] + 1)
    latency = problem.full_ms + np.maximum(lengths - 1, 0)[None] * problem.partial_ms[:, None]
    return np.ceil(latency / unit - 1e-9).astype(np.int64), unit


def worthwhile(table: np.ndarray, units: np.ndarray, kind: Kind) -> np.ndarray:
    """The table without segments that can be replaced, at no more time and cost, by one of another cut or by two of one cut.

    Half of the segments of 13 cuts go, all that any series of segments could replace but for 3 in 100.
    """
    kept = table.copy()
    for length in range(1, min(table.shape[2], table.shape[1] + 1)):
        calls = table.shape[1] - length + 1
        alone = table[:, :calls, length]
        pairs = [JOIN[kind](table[:, :calls, one], table[:, one : one + calls, length - one]) for one in range(1, length)]
        spent = np.concatenate([*(units[:, one] + units[:, length - one] for one in range(1, length)), units[:, length]])
        order = np.argsort(spent, kind="stable")  # of equal time, the segment itself behind the pairs
        least = np.minimum.accumulate(np.concatenate([*pairs, alone])[order], axis=0)
        rank = np.argsort(order)[-len(table) :]
        replaced = (rank > 0)[:, None] & (least[np.maximum(rank - 1, 0)] <= alone)
        kept[:, :calls, length][replaced] = np.inf
    return kept
