"""Pooled errors, and the weight that a layer computes with."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from qdm_cli.engine.evaluation.subject import weight_of
from qdm_cli.engine.evaluation.trace import ErrorSum, Trace, weight_sqnr_db
from qdm_cli.engine.quant.modules import CodedWeight, QLinear
from qdm_cli.engine.quant.report import dequantized_weight
from qdm_cli.engine.quant.state import LayerDecision, LayerState


def test_errors_are_pooled_over_batches() -> None:
    truth, value = (
        torch.randn(8, 3, generator=torch.Generator().manual_seed(0)),
        torch.randn(8, 3, generator=torch.Generator().manual_seed(1)),
    )
    whole, parts = ErrorSum(), ErrorSum()
    whole.add(value, truth)
    for v, t in zip(value.split(3), truth.split(3), strict=True):
        parts.add(v, t)
    assert whole.relative == pytest.approx(((value - truth).norm() / truth.norm()).item(), rel=1e-6)
    assert whole.mse == pytest.approx((value - truth).square().mean().item(), rel=1e-6)
    assert parts.relative == pytest.approx(whole.relative, rel=1e-12)


def test_a_zero_signal_gives_the_absolute_error() -> None:
    error = ErrorSum()
    error.add(torch.full((4,), 0.5), torch.zeros(4))
    assert error.relative == 1.0


def test_the_common_first_noise_does_not_dilute_the_latent_error() -> None:
    trace = Trace(
        timesteps=[9, 5, 1], latent=[ErrorSum(0, 1, 1), ErrorSum(0.04, 1, 1), ErrorSum(0.16, 1, 1)], noise=[ErrorSum(0.01, 1, 1)] * 3
    )
    metrics = trace.metrics()
    assert metrics["latent_error"] == pytest.approx(0.3) and metrics["latent_error_last"] == pytest.approx(0.4)
    assert metrics["latent_mse_last"] == pytest.approx(0.16)
    assert metrics["noise_error"] == pytest.approx(0.1) == metrics["noise_error_worst"]
    assert [row["call"] for row in trace.rows()] == [0, 1, 2]


def coded_layer(group: int | None) -> tuple[LayerState, QLinear]:
    rng = torch.Generator().manual_seed(0)
    granularity = "group" if group else "channel"
    decision = LayerDecision("x", "Linear", (6, 16), "other", bits_w=4, granularity=granularity, group_size=group)
    shape = (6, 16 // group) if group else (6,)
    codes = torch.randint(-8, 8, (6, 16), generator=rng, dtype=torch.int8)
    state = LayerState(decision, codes, torch.rand(shape, generator=rng), torch.randint(-8, 8, shape, generator=rng, dtype=torch.int8))
    return state, QLinear(decision, CodedWeight(state), None, None, step=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [None, 8], ids=["channel", "group8"])
def test_the_weight_of_a_simulated_layer(group: int | None) -> None:
    state, layer = coded_layer(group)
    assert torch.allclose(weight_of(layer), dequantized_weight(state), rtol=1e-6)


def test_layers_without_a_weight_have_no_sqnr() -> None:
    assert weight_of(nn.SiLU()) is None
    assert weight_sqnr_db(nn.SiLU(), nn.SiLU()) is None


def test_sqnr_in_decibel() -> None:
    layer, twin = nn.Linear(8, 8), nn.Linear(8, 8)
    with torch.no_grad():
        twin.weight.copy_(layer.weight * 1.1)
    assert weight_sqnr_db(layer, twin) == pytest.approx(10 * math.log10(100), rel=1e-4)
    assert weight_sqnr_db(layer, layer) == 200
