"""PSNR, SSIM and LPIPS of pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from qdm_cli.engine.evaluation.images import PSNR_CAP_DB, PairedMetrics, load_lpips, psnr_db, ssim


def pairs(count: int = 4, size: int = 32, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(count, 1, size, size, generator=rng)
    noise = torch.randn(images.shape, generator=rng) * torch.linspace(0.01, 0.2, count)[:, None, None, None]
    return images, (images + noise).clamp(0, 1)


def test_psnr_is_that_of_numpy_per_pair() -> None:
    a, b = pairs()
    error = np.square(a.double().numpy() - b.double().numpy()).mean((1, 2, 3))
    np.testing.assert_allclose(psnr_db(a, b).numpy(), 10 * np.log10(1 / error), rtol=1e-5)


def test_equal_images_score_the_cap_and_one() -> None:
    a, _ = pairs()
    assert psnr_db(a, a.clone()).tolist() == [PSNR_CAP_DB] * 4
    assert torch.allclose(ssim(a, a.clone()), torch.ones(4))


def test_ssim_sees_structure_that_psnr_does_not() -> None:
    ramp = torch.linspace(0, 1, 32).expand(1, 1, 32, 32)
    rng = torch.Generator().manual_seed(0)
    shifted, noisy = ramp + 0.05, ramp + 0.05 * torch.randn(ramp.shape, generator=rng).sign()
    assert psnr_db(shifted, ramp).item() == pytest.approx(psnr_db(noisy, ramp).item(), abs=0.01)
    assert ssim(shifted, ramp).item() > ssim(noisy, ramp).item() + 0.1


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_running_metrics_do_not_depend_on_the_batch(batch: int) -> None:
    a, b = pairs(8)
    whole, parts = PairedMetrics(lpips_why="w"), PairedMetrics(lpips_why="w")
    whole.add(a, b)
    for x, y in zip(a.split(batch), b.split(batch), strict=True):
        parts.add(x, y)
    for name, value in whole.metrics().items():
        assert parts.metrics()[name] == (value if isinstance(value, str) or value is None else pytest.approx(value, rel=1e-6))


def test_mean_worst_and_pooled() -> None:
    a, b = pairs()
    metrics = PairedMetrics()
    metrics.add(a, b)
    found = metrics.metrics()
    each = psnr_db(a, b)
    error = np.square(a.double().numpy() - b.double().numpy()).mean()
    assert found["psnr"] == pytest.approx(each.mean().item(), rel=1e-6)
    assert found["psnr_worst"] == pytest.approx(each.min().item(), rel=1e-6)
    assert found["psnr_pooled"] == pytest.approx(10 * np.log10(1 / error), rel=1e-6)


def test_images_smaller_than_the_window_have_no_ssim() -> None:
    metrics = PairedMetrics(lpips_why="not set")
    metrics.add(*pairs(size=8))
    found = metrics.metrics()
    assert found["ssim"] is None and "window" in str(found["ssim_why"])
    assert found["lpips"] is None and found["lpips_why"] == "not set"
    assert found["psnr"] is not None


def test_lpips_without_weights_is_null_with_the_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    assert load_lpips(None, offline=True) == (None, "evaluate.weights.lpips is not set")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network, why = load_lpips("auto", offline=True)
    assert network is None and why is not None
    assert "torchvision" in why or "offline" in why
