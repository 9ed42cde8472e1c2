"""The step is read from the call, so no order or number of calls can shift it."""

import pytest
import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext

KEYS = torch.tensor([1.0, 51.0, 101.0, 951.0])
TABLE = torch.tensor([10.0, 20.0, 30.0, 40.0])


class Denoiser(nn.Module):
    def __init__(self, step, table):
        super().__init__()
        self.step, self.table = step, table

    def forward(self, sample, timestep, encoder_hidden_states=None):
        return self.step.pick(self.table)


@pytest.fixture
def denoiser():
    step = StepContext(KEYS)
    model = Denoiser(step, TABLE)
    step.attach(model)
    return model


@pytest.mark.parametrize(
    "order", [[951, 101, 51, 1], [1, 951, 51, 101], [951, 951, 101, 101, 1]], ids=["forward", "permuted", "two calls each"]
)
def test_row_depends_on_the_timestep_alone(denoiser, order):
    expected = dict(zip(KEYS.tolist(), TABLE.tolist(), strict=True))
    x = torch.zeros(1)
    assert [float(denoiser(x, t)) for t in order] == [expected[t] for t in order]
    assert [float(denoiser(x, timestep=torch.tensor(t))) for t in order] == [expected[t] for t in order]
    assert [float(denoiser(x, torch.tensor([t]))) for t in order] == [expected[t] for t in order]


def test_mixed_batch_reads_one_row_per_sample(denoiser):
    picked = denoiser(torch.zeros(3), torch.tensor([951, 1, 51]))
    assert picked.tolist() == [40.0, 10.0, 20.0]


def test_unknown_timesteps_take_the_nearest_row_or_interpolate():
    nearest, linear = StepContext(KEYS), StepContext(KEYS, mode="linear")
    for t, near, line in [(20, 10.0, 13.8), (40, 20.0, 17.8), (26, 10.0, 15.0), (0, 10.0, 10.0), (999, 40.0, 40.0)]:
        nearest.set_timestep(t)
        linear.set_timestep(t)
        assert float(nearest.pick(TABLE)) == near
        assert float(linear.pick(TABLE)) == pytest.approx(line)


def test_keys_may_come_in_any_order():
    step = StepContext(KEYS.flip(0))
    step.set_timestep(51)
    assert float(step.pick(TABLE.flip(0))) == 20.0


def test_one_row_serves_every_step():
    step = StepContext()
    step.set_timestep(500)
    assert float(step.pick(torch.tensor([7.0]))) == 7.0


def test_a_model_without_timestep_is_refused():
    with pytest.raises(ValueError, match="no argument `timestep`"):
        StepContext(KEYS).attach(nn.Linear(2, 2))
