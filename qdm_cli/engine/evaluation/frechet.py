"""Distances between sets of image features: Frechet distance (Heusel et al. 2017, Eq. 6) and KID (Binkowski et al. 2018, Sec. 4)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

KID_SUBSETS = 100
KID_SUBSET_SIZE = 1000


@dataclass(frozen=True)
class Gaussian:
    """First two moments of a set of features: mean f64 [D], unbiased covariance f64 [D, D], and how many features they were taken from."""

    mean: torch.Tensor
    covariance: torch.Tensor
    n: int


def gaussian_of(features: torch.Tensor) -> Gaussian:
    """Moments of features [N, D], any float type, in float64. N >= 2."""
    x = features.double()
    mean = x.mean(0)
    centred = x - mean
    return Gaussian(mean, centred.T @ centred / (len(x) - 1), len(x))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), in float64.

    tr (S_a S_b)^(1/2) is the nuclear norm of S_a^(1/2) S_b^(1/2): unlike the eigenvalues of the product it needs no complex
    numbers, no offset for singular covariances, and loses no digits to a square root of small eigenvalues.
    """
    cross = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross
    return max(0.0, distance.item())


def _root(covariance: torch.Tensor) -> torch.Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def kernel_distance(a: torch.Tensor, b: torch.Tensor, *, seed: int = 0) -> tuple[float, float]:
    """KID of features [N, D] and [M, D]: mean and standard deviation of the unbiased MMD^2, cubic kernel, over random subsets.

    100 subsets of 1000, or of all when a set is smaller; drawn from `seed`, so equal sets of features give equal numbers.
    """
    from torchmetrics.image.kid import poly_mmd

    size = min(KID_SUBSET_SIZE, len(a), len(b))
    rng = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(KID_SUBSETS):
        pick_a = torch.randperm(len(a), generator=rng)[:size]
        pick_b = torch.randperm(len(b), generator=rng)[:size]
        values.append(poly_mmd(a[pick_a].double(), b[pick_b].double()))
    stacked = torch.stack(values)
    return stacked.mean().item(), stacked.std(correction=0).item()
