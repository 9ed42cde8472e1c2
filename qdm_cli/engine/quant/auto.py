"""`quantize.auto`: bits per layer that keep the summed error smallest under a budget, a multiple-choice knapsack. Imports no torch.

Kellerer, Pferschy, Pisinger, Knapsack Problems (2004), ch. 11: the linear relaxation takes the steps of the layers' lower convex hulls by
error saved per unit of cost; a dynamic programme over undominated states, pruned by that bound, is exact.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf

STATES = 500
"""States kept after each layer; beyond, those with the best bound are, and the result says how far from the optimum it can be."""
ROUNDING = 1e-12
TOLERANCE = 1e-4
"""Share of the error that is not worth searching for: the proof of the last 0.01 % takes a minute at 800 layers, the rest a second."""


@dataclass(frozen=True)
class Choice:
    """One width of one layer. `cost`: whole units of the budget; `error`: what is summed."""

    bits: int
    cost: int
    error: float


@dataclass(frozen=True)
class Allocation:
    """One choice per layer.

    Attributes:
        cost, error: their sums.
        gap: the optimum is at least `error - gap`; 0 = this is the optimum, up to rounding.
    """

    choices: tuple[Choice, ...]
    cost: int
    error: float
    gap: float


@dataclass(frozen=True)
class _Step:
    """From one corner of a layer's hull to the next: more cost, less error."""

    layer: int
    to: Choice
    cost: int
    saved: float

    @property
    def slope(self) -> float:
        return self.saved / self.cost


@dataclass(frozen=True)
class _Relaxed:
    """Least summed error of layers i.. by budget, relaxed: convex and piecewise linear, steepest step first."""

    base_cost: int
    base_error: float
    costs: list[int]
    saved: list[float]
    steps: list[_Step]

    @classmethod
    def of(cls, hulls: Sequence[Sequence[Choice]], steps: list[_Step]) -> _Relaxed:
        cheapest = [hull[0] for hull in hulls]
        costs, saved = list(accumulate(step.cost for step in steps)), list(accumulate(step.saved for step in steps))
        return cls(sum(c.cost for c in cheapest), sum(c.error for c in cheapest), costs, saved, steps)

    def bound(self, budget: int) -> float:
        """Infinity = not even the cheapest choices fit."""
        room = budget - self.base_cost
        if room < 0:
            return inf
        whole = bisect_right(self.costs, room)
        saved = self.saved[whole - 1] if whole else 0.0
        if whole < len(self.costs):
            saved += (room - (self.costs[whole - 1] if whole else 0)) * self.steps[whole].slope
        return self.base_error - saved


_Path = tuple[Choice, "_Path"] | None
_State = tuple[int, float, _Path]


def allocate(layers: Sequence[Sequence[Choice]], budget: int, *, states: int = STATES, tolerance: float = TOLERANCE) -> Allocation | None:
    """The choice per layer with the least summed error and a summed cost of at most `budget`.

    Args:
        layers: choices of each layer, at least one, in any order.
        states, tolerance: see `STATES`, `TOLERANCE`; tolerance 0 = search to the end.

    Returns:
        None = even the cheapest choices cost more than the budget.
    """
    hulls = [lower_hull(choices) for choices in layers]
    steps = sorted(_steps(hulls), key=lambda step: -step.slope)
    suffixes = [_Relaxed.of(hulls[first:], [step for step in steps if step.layer >= first]) for first in range(len(layers) + 1)]
    if suffixes[0].bound(budget) == inf:
        return None
    best = _improved(layers, _greedy(hulls, steps, budget), budget)
    # sums in another order differ in the last digits: a bound that close to the best is no improvement
    worth = sum(choice.error for choice in best) * (1 - max(tolerance, ROUNDING))
    found, lost = _search(layers, suffixes, budget, worth, states)
    best = found or best
    error = sum(choice.error for choice in best)
    gap = error - max(suffixes[0].bound(budget), min(lost, worth, error))
    return Allocation(tuple(best), sum(choice.cost for choice in best), error, gap if gap > 2 * ROUNDING * error else 0.0)


def lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Corners of the lower convex hull of (cost, error), cheapest first, as long as the error falls."""
    hull: list[Choice] = []
    for choice in sorted(choices, key=lambda c: (c.cost, c.error)):
        if hull and choice.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(a: Choice, b: Choice) -> float:
    """Error saved per unit of cost from a to b, which costs more."""
    return (a.error - b.error) / (b.cost - a.cost)


def _steps(hulls: Sequence[Sequence[Choice]]) -> Iterator[_Step]:
    for layer, hull in enumerate(hulls):
        for a, b in pairwise(hull):
            yield _Step(layer, b, b.cost - a.cost, a.error - b.error)


def _greedy(hulls: Sequence[Sequence[Choice]], steps: list[_Step], budget: int) -> list[Choice]:
    """The relaxation's whole steps: from the cheapest choices, the steepest step that fits, layer by layer in hull order."""
    chosen = [hull[0] for hull in hulls]
    room, blocked = budget - sum(choice.cost for choice in chosen), set()
    for step in steps:
        if step.cost > room:
            blocked.add(step.layer)
        elif step.layer not in blocked:
            chosen[step.layer], room = step.to, room - step.cost
    return chosen


def _improved(layers: Sequence[Sequence[Choice]], chosen: list[Choice], budget: int) -> list[Choice]:
    """The largest single change of a layer that fits, until none lowers the error."""
    room = budget - sum(choice.cost for choice in chosen)
    while True:
        changes = [
            (now.error - choice.error, layer, choice)
            for layer, now in enumerate(chosen)
            for choice in layers[layer]
            if choice.error < now.error and choice.cost - now.cost <= room
        ]
        if not changes:
            return chosen
        _, layer, choice = max(changes, key=lambda change: change[0])
        room -= choice.cost - chosen[layer].cost
        chosen = [*chosen[:layer], choice, *chosen[layer + 1 :]]


def _search(
    layers: Sequence[Sequence[Choice]], suffixes: list[_Relaxed], budget: int, worth: float, limit: int
) -> tuple[list[Choice] | None, float]:
    """Dynamic programme over (cost, error) states.

    Returns:
        Choices with less error than `worth` (None = there are none), and a lower bound of the error of everything that was left out.
    """
    front: list[_State] = [(0, 0.0, None)]
    lost = inf
    for layer, choices in enumerate(layers):
        grown: list[_State] = [(cost + c.cost, error + c.error, (c, path)) for cost, error, path in front for c in choices]
        bounded = [(error + suffixes[layer + 1].bound(budget - cost), cost, error, path) for cost, error, path in _undominated(grown)]
        kept = [entry for entry in bounded if entry[0] < worth]
        if len(kept) > limit:
            kept.sort(key=lambda entry: entry[0])
            lost = min(lost, kept[limit][0])
            del kept[limit:]
        front = [(cost, error, path) for _, cost, error, path in kept]
    if not front:
        return None, lost
    return list(_unwound(min(front, key=lambda state: state[1])[2]))[::-1], lost


def _undominated(states: list[_State]) -> Iterator[_State]:
    """Without those that another state beats in cost and error, cheapest first."""
    least = inf
    for state in sorted(states, key=lambda state: (state[0], state[1])):
        if state[1] < least:
            least = state[1]
            yield state


def _unwound(path: _Path) -> Iterator[Choice]:
    while path is not None:
        choice, path = path
        yield choice
