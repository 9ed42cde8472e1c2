"""Frechet distance against closed forms, scipy and torchmetrics; KID against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from qdm_cli.engine.evaluation.frechet import Gaussian, frechet_distance, gaussian_of, kernel_distance


def random_gaussian(dimensions: int, seed: int, rank: int | None = None) -> Gaussian:
    rng = torch.Generator().manual_seed(seed)
    root = torch.randn(dimensions, rank or dimensions, generator=rng, dtype=torch.float64)
    return Gaussian(torch.randn(dimensions, generator=rng, dtype=torch.float64), root @ root.T, 1000)


def test_commuting_gaussians_have_a_closed_form() -> None:
    variances_a, variances_b = torch.tensor([4.0, 9.0, 0.25]).double(), torch.tensor([1.0, 16.0, 0.25]).double()
    a = Gaussian(torch.tensor([1.0, 0.0, 2.0]).double(), variances_a.diag(), 10)
    b = Gaussian(torch.tensor([0.0, 2.0, 2.0]).double(), variances_b.diag(), 10)
    # |m|^2 = 1 + 4; (2-1)^2 + (3-4)^2 + 0
    assert frechet_distance(a, b) == pytest.approx(7.0, abs=1e-12)


@pytest.mark.parametrize("dimensions", [1, 5, 64])
def test_matches_the_matrix_square_root_of_scipy(dimensions: int) -> None:
    a, b = random_gaussian(dimensions, 1), random_gaussian(dimensions, 2)
    root = scipy.linalg.sqrtm(a.covariance.numpy() @ b.covariance.numpy()).real
    expected = (a.mean - b.mean).square().sum().item() + np.trace(a.covariance.numpy() + b.covariance.numpy() - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_matches_torchmetrics() -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1).double() / 255

    rng = torch.Generator().manual_seed(0)
    real, fake = (torch.randint(0, top, (200, 3, 2, 2), generator=rng, dtype=torch.uint8) for top in (255, 200))
    library = FrechetInceptionDistance(feature=Pixels(), input_img_size=(3, 2, 2))
    library.set_dtype(torch.float64)
    library.update(real, real=True)
    library.update(fake, real=False)
    features = Pixels()
    assert frechet_distance(gaussian_of(features(fake)), gaussian_of(features(real))) == pytest.approx(library.compute().item(), rel=1e-6)


def test_equal_sets_have_distance_zero() -> None:
    features = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    assert frechet_distance(gaussian_of(features), gaussian_of(features.clone())) < 1e-9


def test_fewer_samples_than_dimensions() -> None:
    a, b = random_gaussian(40, 3, rank=5), random_gaussian(40, 4, rank=7)
    ridge = 1e-9 * torch.eye(40, dtype=torch.float64)
    full = frechet_distance(Gaussian(a.mean, a.covariance + ridge, 6), Gaussian(b.mean, b.covariance + ridge, 8))
    assert frechet_distance(a, b) == pytest.approx(full, rel=1e-4)
    assert frechet_distance(a, a) < 1e-9


def test_is_symmetric() -> None:
    a, b = random_gaussian(16, 5), random_gaussian(16, 6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)


def test_moments_are_unbiased_and_in_float64() -> None:
    features = 1000 + torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    moments = gaussian_of(features)
    assert moments.covariance.dtype == torch.float64
    np.testing.assert_allclose(moments.covariance.numpy(), np.cov(features.double().numpy().T), rtol=1e-10)


def cubic_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Unbiased squared MMD, summed pair by pair."""

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return (x @ y / len(x) + 1) ** 3

    n, m = len(a), len(b)
    within_a = sum(kernel(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_b = sum(kernel(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_a + within_b - 2 * sum(kernel(x, y) for x in a for y in b) / (n * m)


def test_kernel_distance_is_the_unbiased_mmd() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(12, 5, generator=rng), 0.5 + torch.randn(12, 5, generator=rng)
    mean, deviation = kernel_distance(a, b)
    assert mean == pytest.approx(cubic_mmd(a.double().numpy(), b.double().numpy()), rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9), "every subset is the whole set here"


def test_kernel_distance_is_reproducible_and_seeded() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(50, 4, generator=rng), torch.randn(20, 4, generator=rng)
    assert kernel_distance(a, b, seed=1) == kernel_distance(a, b, seed=1)
    assert kernel_distance(a, b, seed=1) != kernel_distance(a, b, seed=2)
