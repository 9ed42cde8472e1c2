"""The last word has the measured error: plans of several objectives, and plans with one full call moved, compared on real trajectories.

The search adds up errors that were measured one by one. On a real trajectory they grow or cancel together, differently for every model,
so which sum predicts best is not known beforehand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from qdm_cli.engine.caching import dp

Key = tuple[tuple[int, ...], tuple[int, ...]]
TINY = 1e-12
SURE = 1.0
"""Standard errors by which a plan must be nearer on the same trajectories to take the place of another: of many plans that are compared on
few trajectories, the best one by its mean alone is best on those and not on others."""


@dataclass
class Trials:
    """Measured errors by schedule, at most `limit` of them.

    Attributes:
        measure: plan -> [N] error of each of the same N trajectories.
    """

    measure: Callable[[dp.Plan], np.ndarray]
    limit: int
    errors: dict[Key, np.ndarray] = field(default_factory=dict)

    @property
    def left(self) -> int:
        return self.limit - len(self.errors)

    def each(self, plan: dp.Plan) -> np.ndarray:
        """[N] measured once per schedule."""
        if _key(plan) not in self.errors:
            self.errors[_key(plan)] = self.measure(plan)
        return self.errors[_key(plan)]

    def error(self, plan: dp.Plan) -> float:
        """Mean over trajectories."""
        return float(self.each(plan).mean())

    def nearer(self, plan: dp.Plan, other: dp.Plan) -> bool:
        """Whether `plan` has the smaller errors, by more than chance on these trajectories: ratios, so that no single one decides."""
        change = np.log(np.maximum(self.each(plan), TINY)) - np.log(np.maximum(self.each(other), TINY))
        doubt = change.std(ddof=1) / math.sqrt(len(change)) if len(change) > 1 else 0.0
        return bool(change.mean() < -SURE * doubt)

    def knows(self, plan: dp.Plan) -> bool:
        return _key(plan) in self.errors

    def afford(self, *plans: dp.Plan) -> bool:
        """Whether the trials left suffice to compare plans."""
        return sum(not self.knows(plan) for plan in plans) <= self.left


def _key(plan: dp.Plan) -> Key:
    return plan.refreshes, plan.cuts


def refined(problem: dp.Problem, starts: Sequence[dp.Plan], latency_ms: float, trials: Trials) -> dp.Plan:
    """The plan that no measured one is surely nearer than: first among `starts`, then step by step among its neighbours, until no trial is
    left or none is nearer.

    Args:
        starts: by trust; a later one must be surely nearer than an earlier one. Neighbours are tried by their predicted cost.
    """
    best, *others = {_key(plan): plan for plan in starts}.values()
    for plan in others:
        if trials.afford(plan, best) and trials.nearer(plan, best):
            best = plan
    while trials.left > 0:
        tried = [plan for plan in sorted(neighbours(problem, best, latency_ms), key=lambda plan: plan.cost) if not trials.knows(plan)]
        nearer = next((plan for plan in tried if trials.afford(plan, best) and trials.nearer(plan, best)), None)
        if nearer is None:
            break
        best = nearer
    return best


def neighbours(problem: dp.Problem, plan: dp.Plan, latency_ms: float) -> Iterator[dp.Plan]:
    """Plans with one full call moved by a call or added, or one segment on another cut, that keep the constraints and the time."""
    for index in range(1, len(plan.refreshes)):
        for shift in (-1, 1):
            moved = list(plan.refreshes)
            moved[index] += shift
            if moved[index - 1] < moved[index] < ([*moved[1:], problem.calls])[index]:
                yield from _kept(problem, moved, plan.cuts, latency_ms)
    for index, (start, end) in enumerate(pairwise([*plan.refreshes, problem.calls])):
        for call in range(start + 1, end):
            refreshes = [*plan.refreshes[: index + 1], call, *plan.refreshes[index + 1 :]]
            yield from _kept(problem, refreshes, [*plan.cuts[: index + 1], *plan.cuts[index:]], latency_ms)
    for index in range(len(plan.refreshes) if problem.mixed else 0):
        for cut in range(problem.drift.shape[0]):
            if cut != plan.cuts[index]:
                yield from _kept(problem, plan.refreshes, [*plan.cuts[:index], cut, *plan.cuts[index + 1 :]], latency_ms)


def _kept(problem: dp.Problem, refreshes: Sequence[int], cuts: Sequence[int], latency_ms: float) -> Iterator[dp.Plan]:
    allowed = problem.starts is None or all(call == 0 or call in problem.starts or call in problem.forced for call in refreshes)
    found = dp.evaluate(problem, tuple(refreshes), tuple(cuts))
    if allowed and np.isfinite(found.cost) and found.latency_ms <= latency_ms * (1 + 1e-12):
        yield found
