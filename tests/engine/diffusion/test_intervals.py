"""Time-step intervals (distill-prune-evaluate spec 4.4)."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch

from qdm_cli.engine.diffusion.interval_config import IntervalSpec
from qdm_cli.engine.diffusion.intervals import (
    best_blocks,
    clustered_keys,
    interval_of,
    optimal_denoiser,
    similarity,
    uniform_keys,
    unvisited,
)
from qdm_cli.engine.diffusion.noising import NoiseSchedule
from qdm_cli.engine.errors import InputError


def schedule(steps: int = 1000) -> NoiseSchedule:
    alphas = torch.cumprod(1 - torch.linspace(1e-4, 0.02, steps, dtype=torch.float64), 0)
    return NoiseSchedule("epsilon", torch.arange(steps), alphas.sqrt(), (1 - alphas).sqrt(), float(steps))


def brute_force(affinity: torch.Tensor, k: int, min_len: int) -> float:
    n, best = len(affinity), -1.0
    for cuts in combinations(range(1, n), k - 1):
        edges = [0, *cuts, n]
        if all(b - a >= min_len for a, b in pairwise(edges)):
            best = max(best, sum(float(affinity[a:b, a:b].mean()) * (b - a) for a, b in pairwise(edges)))
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("k", "min_len"), [(1, 1), (2, 1), (3, 2), (4, 1), (3, 3)])
def test_the_programme_finds_what_brute_force_finds(seed: int, k: int, min_len: int) -> None:
    raw = torch.rand(9, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    affinity = (raw + raw.T) / 2
    starts = best_blocks(affinity, k, min_len)
    edges = [*starts, 9]
    assert starts[0] == 0 and len(starts) == k
    assert all(b - a >= min_len for a, b in pairwise(edges))
    value = sum(float(affinity[a:b, a:b].mean()) * (b - a) for a, b in pairwise(edges))
    assert value == pytest.approx(brute_force(affinity, k, min_len), abs=1e-12)


def test_the_least_length_is_honoured() -> None:
    images = torch.rand(64, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    for min_len in (1, 6):
        keys = clustered_keys(IntervalSpec(method="optimal_denoiser", k=3, min_len=min_len, samples=32), schedule(), images, None, seed=0)
        lengths = torch.cat([keys, torch.tensor([1000.0])]).diff()
        assert (float(lengths.min()) >= 250) == (min_len == 6)


def test_similarity_is_a_share() -> None:
    estimates = torch.randn(5, 3, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    found = similarity(estimates)
    torch.testing.assert_close(found, found.T)
    assert torch.equal(found.diagonal(), torch.ones(5, dtype=torch.float64))
    assert float(found.min()) >= 0


def test_the_optimal_denoiser_is_the_posterior_mean() -> None:
    """Against the definition, written out with Python floats."""
    data = torch.tensor([[-1.0], [0.5], [1.0]])
    x, a, s = 0.2, 0.8, 0.6
    weights = torch.tensor([-((x - a * float(y)) ** 2) / (2 * s**2) for y in data], dtype=torch.float64).exp()
    wanted = float((weights * data.double().flatten()).sum() / weights.sum())
    assert float(optimal_denoiser(torch.tensor([[x]], dtype=torch.float64), data, a, s)) == pytest.approx(wanted, abs=1e-12)
    assert float(optimal_denoiser(torch.tensor([[0.45]]), data, 1.0, 0.0)) == 0.5


def test_the_first_bound_moves_with_the_distance_of_the_modes() -> None:
    """Two far modes are told apart at more noise than two near ones."""
    rng = torch.Generator().manual_seed(0)
    firsts = []
    for distance in (0.2, 3.0):
        signs = torch.where(torch.rand(200, 1, 1, 1, generator=rng) < 0.5, -1.0, 1.0)
        data = distance * signs * torch.ones(200, 1, 2, 2) + 0.001 * torch.randn(200, 1, 2, 2, generator=rng)
        keys = clustered_keys(IntervalSpec(method="optimal_denoiser", k=3, samples=200), schedule(), data, None, seed=0)
        firsts.append(float(keys[1]))
    assert firsts[1] > firsts[0]


def test_more_blocks_than_nodes_are_refused() -> None:
    with pytest.raises(InputError, match="11 of at least 2 nodes do not fit into 21"):
        clustered_keys(IntervalSpec(method="optimal_denoiser", k=11), schedule(), torch.zeros(4, 1, 2, 2), None, seed=0)


@pytest.mark.parametrize(("k", "end"), [(1, 1000.0), (2, 1000.0), (3, 1000.0), (4, 1.0), (7, 1000.0)])
def test_the_uniform_rule(k: int, end: float) -> None:
    times = [0.0, 0.2 * end, 0.499 * end, 0.5 * end, 0.75 * end, 0.999 * end, end]
    assert interval_of(uniform_keys(k, end), times) == [min(int(t * k / end), k - 1) for t in times]


def test_a_few_step_sampler_misses_intervals() -> None:
    assert unvisited(uniform_keys(4, 1000.0), [999.0, 499.0]) == ["[0, 250)", "[500, 750)"]
    assert unvisited(uniform_keys(2, 1000.0), [999.0, 499.0]) == []
