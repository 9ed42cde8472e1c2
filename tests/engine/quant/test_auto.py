"""The knapsack behind `quantize.auto`, against every assignment of small cases."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdm_cli.engine.quant.auto import Choice, allocate, lower_hull

WIDTHS = (2, 3, 4, 6, 8)


def instance(rng: random.Random, count: int, *, largest: int = 9) -> list[list[Choice]]:
    """Errors fall by about 4 per bit, as those of uniform quantizers do, with noise that breaks convexity and now and then the order."""
    layers = []
    for _ in range(count):
        size, level = rng.randint(1, largest), 10 ** rng.uniform(-3, 1)
        layers.append([Choice(bits, size * bits, level * 4.0**-bits * rng.uniform(0.2, 4)) for bits in rng.sample(WIDTHS, len(WIDTHS))])
    return layers


def best_of_all(layers: list[list[Choice]], budget: int) -> float | None:
    sums = [(sum(c.cost for c in picks), sum(c.error for c in picks)) for picks in itertools.product(*layers)]
    return min((error for cost, error in sums if cost <= budget), default=None)


@pytest.mark.parametrize("seed", range(60))
def test_it_finds_the_best_of_all_assignments(seed: int) -> None:
    rng = random.Random(seed)
    layers = instance(rng, rng.randint(1, 5))
    budget = rng.randint(1, sum(max(c.cost for c in layer) for layer in layers))
    best, found = best_of_all(layers, budget), allocate(layers, budget, tolerance=0)
    if best is None:
        assert found is None
        return
    assert found is not None and found.cost <= budget and found.gap == 0
    assert found.error == pytest.approx(best, rel=1e-9)
    assert all(choice in layer for choice, layer in zip(found.choices, layers, strict=True))


@pytest.mark.parametrize(("states", "tolerance"), [(1, 0.0), (3, 0.0), (500, 0.05)], ids=["one state", "three states", "5 percent"])
def test_a_cut_search_says_how_far_it_can_be_from_the_optimum(states: int, tolerance: float) -> None:
    gaps = []
    for seed in range(40):
        rng = random.Random(seed)
        layers = instance(rng, 5)
        budget = rng.randint(sum(min(c.cost for c in layer) for layer in layers), sum(max(c.cost for c in layer) for layer in layers))
        best, found = best_of_all(layers, budget), allocate(layers, budget, states=states, tolerance=tolerance)
        assert best is not None and found is not None and found.cost <= budget
        assert found.error - found.gap <= best * (1 + 1e-9) <= found.error * (1 + 2e-9)
        gaps.append(found.gap)
    assert any(gaps), "a search that is cut short proves less than a whole one"


def test_many_layers_come_within_the_tolerance() -> None:
    rng = random.Random(0)
    layers = instance(rng, 250, largest=150_000)
    cheapest = sum(min(c.cost for c in layer) for layer in layers)
    found = allocate(layers, 2 * cheapest)
    assert found is not None and cheapest < found.cost <= 2 * cheapest
    assert found.gap <= 1e-3 * found.error


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 10, allow_nan=False, allow_subnormal=False)), min_size=1, max_size=8))
def test_the_hull_is_convex_and_lies_below_every_choice(points: list[tuple[int, float]]) -> None:
    choices = [Choice(k, cost, error) for k, (cost, error) in enumerate(points)]
    hull = lower_hull(choices)
    assert hull[0].cost == min(c.cost for c in choices) and hull[-1].error == min(c.error for c in choices)
    slopes = [(a.error - b.error) / (b.cost - a.cost) for a, b in itertools.pairwise(hull)]
    assert all(a > b > 0 for a, b in itertools.pairwise([*slopes, *slopes[-1:]][: len(slopes)])) and all(s > 0 for s in slopes)
    for c in choices:
        below = [
            a.error + (b.error - a.error) * (c.cost - a.cost) / (b.cost - a.cost)
            for a, b in itertools.pairwise(hull)
            if a.cost <= c.cost <= b.cost
        ]
        assert all(c.error >= error - 1e-9 for error in below)


def test_a_wider_layer_is_not_bought_when_it_does_not_help() -> None:
    found = allocate([[Choice(4, 4, 1.0), Choice(8, 8, 1.0)], [Choice(4, 4, 2.0), Choice(8, 8, 0.5)]], 16)
    assert found is not None and [choice.bits for choice in found.choices] == [4, 8]
