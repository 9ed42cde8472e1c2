"""Activation tables per group of timesteps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from qdm_cli.engine.diffusion.intervals import uniform_keys
from qdm_cli.engine.quant.grid import IntGrid
from qdm_cli.engine.quant.row_groups import grouped_rows
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime.modules import pack_denoiser_

STEPS = [900.0, 700.0, 500.0, 300.0, 100.0]


def ends(layer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    grid = IntGrid(layer.decision.bits_a)
    zero = layer.act_zero_point.float()
    return (grid.lo - zero) * layer.act_scale, (grid.hi - zero) * layer.act_scale


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
def test_a_row_is_the_least_range_that_holds_its_steps(make_state: Any, tiny_unet: Any, symmetric: bool, split: bool) -> None:
    state = make_state(tiny_unet, keys=STEPS, act_symmetric=symmetric, split=split, skip="nothing" if split else "shortcut")
    grouped = grouped_rows(state, uniform_keys(2, 1000.0))
    assert grouped.row_mode == "interval" and grouped.step_keys.tolist() == [0.0, 500.0]
    for name, layer in grouped.layers.items():
        if not layer.decision.timestep_aware:
            assert layer is state.layers[name]
            continue
        (low, high), (all_low, all_high) = ends(layer), ends(state.layers[name])
        for row, members in ((0, [3, 4]), (1, [0, 1, 2])):
            step = layer.act_scale[row]
            # a range is a whole number of steps of its grid beside the one that it holds
            assert ((low[row] - all_low[members].amin(0)).abs() <= step).all()
            assert ((high[row] - all_high[members].amax(0)).abs() <= step).all()


def test_one_group_per_step_changes_nothing_at_the_steps(make_state: Any, tiny_unet: Any) -> None:
    state = make_state(tiny_unet, keys=STEPS)
    grouped = grouped_rows(state, uniform_keys(5, 1000.0))
    before, after = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)
    apply_state_(before, state)
    apply_state_(after, grouped)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t in STEPS:
            torch.testing.assert_close(after(x, t).sample, before(x, t).sample, rtol=1e-5, atol=1e-6)
        assert not torch.allclose(after(x, 599.0).sample, after(x, 601.0).sample, rtol=1e-5), "the bound of a group"


def test_a_group_without_a_step_takes_the_nearest(make_state: Any, tiny_unet: Any) -> None:
    state = make_state(tiny_unet, keys=[900.0, 100.0])
    grouped = grouped_rows(state, uniform_keys(4, 1000.0))
    name = next(name for name, layer in state.layers.items() if layer.decision.timestep_aware)
    torch.testing.assert_close(grouped.layers[name].act_scale, state.layers[name].act_scale[[1, 1, 0, 0]])


def test_packed_layers_read_the_row_of_the_group(make_state: Any, tiny_unet: Any) -> None:
    state = grouped_rows(make_state(tiny_unet, keys=STEPS), uniform_keys(2, 1000.0))
    simulated, packed = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)
    apply_state_(simulated, state)
    pack_denoiser_(packed, state)
    x = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs = [(packed(x, t).sample, simulated(x, t).sample) for t in (0, 499, 500, 999)]
    for found, wanted in outputs:
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5
    assert float((outputs[1][1] - outputs[2][1]).norm() / outputs[2][1].norm()) > 1e-3
