"""AdaRound (quantization spec 3.1, 3.3 and 8.2): the gain, the undecided share, and what must not change."""

import pytest
import torch

from qdm_cli.engine.quant.adaround import BetaSchedule, RoundedWeight, inverse_rectified_sigmoid, rectified_sigmoid, rounding_penalty
from qdm_cli.engine.quant.grid import IntGrid, PerChannel, PerGroup, QParams, broadcast, choose_qparams, quantize
from qdm_cli.engine.quant.state import LayerDecision


def decision_of(weight: torch.Tensor, bits: int = 4, **fields) -> LayerDecision:
    return LayerDecision("layer", "Linear" if weight.ndim == 2 else "Conv2d", tuple(weight.shape), "other", bits_w=bits, bits_a=8, **fields)


def rounded(weight: torch.Tensor, bits: int = 4, symmetric: bool = False) -> tuple[RoundedWeight, QParams]:
    params = choose_qparams(weight, IntGrid(bits), PerChannel(0), symmetric=symmetric)
    return RoundedWeight(weight, decision_of(weight, bits, symmetric=symmetric), params), params


def learn(module: RoundedWeight, x: torch.Tensor, weight: torch.Tensor, *, iterations: int = 1000, lr: float = 1e-2) -> None:
    """The loop of the specification's table: Adam, batch 32, penalty 0.01."""
    rng, schedule = torch.Generator().manual_seed(1), BetaSchedule(iterations)
    optimizer = torch.optim.Adam([module.v], lr=lr)
    for iteration in range(iterations):
        rows = x[torch.randint(len(x), (32,), generator=rng)]
        centred, scale = module()
        loss = (rows @ (centred * scale[:, None] - weight).T).square().sum(1).mean()
        beta = schedule.at(iteration)
        if beta is not None:
            loss = loss + 0.01 * rounding_penalty(module.h(), beta)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def output_error(codes: torch.Tensor, params: QParams, x: torch.Tensor, weight: torch.Tensor) -> float:
    restored = (codes.double() - params.zero_point.double()[:, None]) * params.scale.double()[:, None]
    want = x.double() @ weight.double().T
    return float((x.double() @ restored.T - want).square().sum() / want.square().sum())


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(5, 7), (4, 3, 3, 3)], ids=["linear", "conv"])
def test_it_starts_at_the_float_weight_and_zero_updates_round_to_nearest(shape, bits, symmetric):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    module, params = rounded(weight, bits, symmetric)
    scaled = weight.double() / broadcast(params.scale, weight.shape, PerChannel(0)).double()
    # of both together: an exact end of the range is k + 0 or (k - 1) + 1, by the last bit of the division
    assert (module.floor.double() + module.h().double() - scaled).abs().max() < 1e-6 * 2**bits
    assert torch.equal(module.hard_codes(), quantize(weight, params, IntGrid(bits), PerChannel(0)))


def test_a_tie_rounds_up():
    weight = torch.tensor([[0.5, -0.5, 1.0, 2.0]])
    module = RoundedWeight(weight, decision_of(weight), QParams(torch.ones(1), torch.zeros(1)))
    assert module.hard_codes().tolist() == [[1, 0, 1, 2]]


def test_group_scales_keep_their_groups():
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 30.0]).repeat_interleave(8)
    params = choose_qparams(weight, IntGrid(4), PerGroup(8))
    module = RoundedWeight(weight, decision_of(weight, granularity="group", group_size=8), params)
    assert torch.equal(module.hard_codes(), quantize(weight, params, IntGrid(4), PerGroup(8)))


def test_the_ends_of_h_are_reached_and_inverted():
    assert rectified_sigmoid(torch.tensor([-20.0, 20.0])).tolist() == [0.0, 1.0]
    h = torch.linspace(0, 0.999, 50)
    assert (rectified_sigmoid(inverse_rectified_sigmoid(h)) - h).abs().max() < 1e-6


def test_the_schedule_waits_then_falls_linearly():
    schedule = BetaSchedule(100)
    assert [schedule.at(i) for i in (0, 19)] == [None, None]
    assert (schedule.at(20), schedule.at(60)) == (20.0, 11.0)
    assert 2.0 < schedule.at(99) < 2.3


def correlated(samples: int = 2048, size: int = 128) -> torch.Tensor:
    """Inputs whose covariance decays as exp(-0.05 |k|) (spec 3.3)."""
    rng = torch.Generator().manual_seed(0)
    lags = torch.arange(size)
    covariance = torch.exp(-0.05 * (lags[:, None] - lags[None]).abs().double())
    return torch.randn(samples, size, generator=rng) @ torch.linalg.cholesky(covariance).T.float()


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return torch.randn(128, 128, generator=torch.Generator().manual_seed(2)) / 128**0.5


def test_correlated_inputs_gain_and_every_weight_decides(weight):
    x = correlated()
    module, params = rounded(weight)
    nearest = output_error(module.hard_codes(), params, x, weight)
    learn(module, x, weight)
    assert output_error(module.hard_codes(), params, x, weight) <= 0.35 * nearest
    assert module.undecided().double().mean() <= 0.02
    assert 0.05 < float((module.hard_codes() != quantize(weight, params, IntGrid(4), PerChannel(0))).double().mean()) < 0.3


def test_white_inputs_lose_nothing(weight):
    x = torch.randn(2048, 128, generator=torch.Generator().manual_seed(0))
    module, params = rounded(weight)
    nearest = output_error(module.hard_codes(), params, x, weight)
    learn(module, x, weight)
    assert output_error(module.hard_codes(), params, x, weight) <= 1.05 * nearest


def test_without_the_penalty_weights_stay_undecided(weight):
    """What the undecided share is for: the soft error is lower, the hard one is not."""
    x = correlated()
    module, _ = rounded(weight)
    optimizer, rng = torch.optim.Adam([module.v], lr=1e-2), torch.Generator().manual_seed(1)
    for _ in range(200):
        rows = x[torch.randint(len(x), (32,), generator=rng)]
        centred, scale = module()
        optimizer.zero_grad()
        (rows @ (centred * scale[:, None] - weight).T).square().sum(1).mean().backward()
        optimizer.step()
    assert module.undecided().double().mean() > 0.3
