"""The common quantizer against float64 oracles."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdm_cli.engine.quant.grid import (
    CentredQuantize,
    IntGrid,
    PerChannel,
    PerGroup,
    PerTensor,
    choose_qparams,
    dequantize,
    fake_quantize,
    quantize,
)

SPECIAL = {
    "zeros": torch.zeros(6, 4),
    "constant": torch.full((6, 4), 3.0),
    "positive": torch.rand(6, 4) + 5,
    "negative": -torch.rand(6, 4) - 5,
    "one element": torch.tensor([[2.5]]),
    "huge": torch.randn(6, 4) * 1e30,
    "tiny": torch.randn(6, 4) * 1e-30,
}


@pytest.mark.parametrize("method", ["max", "mse", "percentile"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_tensors_have_storable_parameters_and_keep_zero(name, symmetric, method):
    x, grid = SPECIAL[name], IntGrid(4)
    params = choose_qparams(x, grid, symmetric=symmetric, method=method)
    assert torch.isfinite(params.scale).all() and (params.scale >= 1e-8).all()
    assert params.zero_point >= grid.lo and params.zero_point <= grid.hi
    assert params.zero_point == params.zero_point.round()
    zero = dequantize(quantize(torch.zeros(3), params, grid), params)
    assert torch.equal(zero, torch.zeros(3))


@pytest.mark.parametrize("bits", range(2, 9))
def test_max_range_covers_the_tensor_within_half_a_step(bits):
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(bits))
    params = choose_qparams(x, IntGrid(bits), PerChannel(0))
    error = (dequantize(quantize(x, params, IntGrid(bits), PerChannel(0)), params, PerChannel(0)) - x).abs()
    # the zero point is rounded, so each end may be cut by half a step
    assert (error <= params.scale[:, None] * 1.0001).all()
    assert (error <= params.scale[:, None] * 0.5001).float().mean() > 0.9


def test_mse_search_is_the_best_of_its_80_candidates():
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(0)) ** 3
    grid = IntGrid(4)
    chosen = choose_qparams(x, grid, method="mse")

    def error(scale: float, zero: float) -> float:
        codes = torch.round((x.double() / scale).clamp(grid.lo - zero, grid.hi - zero))
        return float((codes * scale - x.double()).abs().pow(2.4).mean())

    low, high = float(x.min()), float(x.max())
    errors = []
    for index in range(80):
        shrink = 1 - 0.01 * index
        scale = (high - low) * shrink / 15
        errors.append(error(scale, round(grid.lo - low * shrink / scale)))
    assert error(float(chosen.scale), float(chosen.zero_point)) == pytest.approx(min(errors), rel=1e-3)
    assert min(errors) < 0.8 * errors[0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_refused(bad):
    with pytest.raises(ValueError, match="NaN or infinity"):
        choose_qparams(torch.tensor([1.0, bad]), IntGrid(8))


@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match="between 2 and 8"):
        IntGrid(bits)


@given(st.integers(2, 8), st.integers(1, 5), st.sampled_from([8, 16]), st.booleans())
@settings(max_examples=40, deadline=None)
def test_codes_stay_on_the_grid_and_requantizing_changes_nothing(bits, out, size, symmetric):
    x = torch.randn(out, 3 * size, 2, 2, generator=torch.Generator().manual_seed(bits * out))
    grid, granularity = IntGrid(bits), PerGroup(size)
    params = choose_qparams(x, grid, granularity, symmetric=symmetric)
    assert params.scale.shape == (out, 3)
    codes = quantize(x, params, grid, granularity)
    assert codes.min() >= grid.lo and codes.max() <= grid.hi
    assert torch.equal(quantize(dequantize(codes, params, granularity), params, grid, granularity), codes)


def test_rounding_is_half_to_even():
    params = choose_qparams(torch.tensor([-8.0, 7.0]), IntGrid(4))
    assert quantize(torch.tensor([0.5, 1.5, 2.5, -0.5]), params, IntGrid(4)).tolist() == [0, 2, 2, 0]


@pytest.mark.parametrize("zero", [-3.0, 0.0, 5.0])
def test_gradients_by_x_scale_and_zero_point(zero):
    """Inside: (1, round(x/s) - x/s, 0). Clipped to c: (0, c - z, -s)."""
    grid = IntGrid(4)
    x = (torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 6).requires_grad_()
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    point = torch.tensor(zero, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (CentredQuantize.apply(x, scale, point, grid.lo, grid.hi) * scale * weights).sum().backward()
    ratio = x.detach() / 0.7
    low, high = ratio < grid.lo - zero, ratio > grid.hi - zero
    inside = ~(low | high)
    assert inside.any() and low.any() and high.any()
    assert torch.allclose(x.grad, weights * inside, atol=1e-9)
    by_scale = torch.where(inside, ratio.round() - ratio, torch.where(low, grid.lo - zero, grid.hi - zero).double())
    assert float(scale.grad) == pytest.approx(float((by_scale * weights).sum()), abs=1e-9)
    assert float(point.grad) == pytest.approx(float((-0.7 * (~inside).double() * weights).sum()), abs=1e-9)


def test_fake_quantize_equals_dequantized_codes():
    x = torch.randn(5, 16, 3, 3)
    for granularity in (PerTensor(), PerChannel(0), PerChannel(1), PerGroup(8)):
        params = choose_qparams(x, IntGrid(4), granularity)
        expected = dequantize(quantize(x, params, IntGrid(4), granularity), params, granularity)
        assert torch.equal(fake_quantize(x, params, IntGrid(4), granularity), expected)
