"""Packed pairs against the simulation, in memory and through a folder."""

import copy

import pytest
import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.modules import CodedWeight, build_layer
from qdm_cli.engine.quant.report import dequantized_weight
from qdm_cli.engine.quant.state_apply import apply_state_, scales_of
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_state

POLICIES = {
    "w4a8": {},
    "w8a8": {"bits_w": 8},
    "w4a4": {"bits_a": 4},
    "symmetric": {"symmetric": True, "act_symmetric": True},
    "dynamic": {"act_mode": "dynamic"},
    "weight-only": {"bits_a": None},
}
LAYERS = {
    "linear": (lambda: nn.Linear(40, 12), (3, 5, 40)),
    "conv1x1": (lambda: nn.Conv2d(40, 12, 1), (2, 40, 5, 5)),
    "conv3x3": (lambda: nn.Conv2d(40, 12, 3, padding=1, bias=False), (2, 40, 5, 5)),
    "one pixel": (lambda: nn.Conv2d(40, 12, 1), (2, 40, 1, 1)),
}


def build(kind: str, make_layer_state, rows: int = 1, **policy):
    torch.manual_seed(0)
    original = LAYERS[kind][0]()
    x = torch.randn(LAYERS[kind][1]) * 0.7 + 0.3
    return original, make_layer_state(original, rows=rows, split=24, **policy), x


def simulated(original, state, step=None) -> nn.Module:
    return build_layer(original, state.decision, CodedWeight(state), state.bias, scales_of(state), step or StepContext())


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_simulated_and_packed_agree_to_the_bit(kind, policy, make_layer_state):
    original, state, x = build(kind, make_layer_state, **POLICIES[policy])
    assert torch.equal(packed_from_state(state, original, 1)(x), simulated(original, state)(x))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("timestep", [100.0, 640, torch.tensor([900.0, 130.0])], ids=["row", "between", "per-sample"])
def test_step_rows(mode, timestep, make_layer_state):
    original, state, x = build("conv1x1", make_layer_state, rows=3)
    assert state.act_scale.shape == (3, 2)
    step = StepContext(torch.tensor([900.0, 500.0, 100.0]), mode)
    step.set_timestep(timestep)
    packed = packed_from_state(state, original, 3)
    packed.step = step
    y = packed(x)
    assert torch.equal(y, simulated(original, state, step)(x))
    packed.step = StepContext()
    assert not torch.equal(packed(x), y)  # both halves follow the step


def test_channels_last_and_half_precision(make_layer_state):
    original, state, x = build("conv1x1", make_layer_state)
    packed = packed_from_state(state, original, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    assert packed(last).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(packed(last), packed(x))
    assert torch.equal(packed(x.half()), packed(x.half().float()).half())


def test_stored_tensors_and_the_weight_they_stand_for(make_layer_state):
    original, state, _ = build("conv1x1", make_layer_state)
    packed = packed_from_state(state, original, 1)
    assert {name: tuple(value.shape) for name, value in packed.state_dict().items()} == {
        name: shape for name, (_, shape) in packed.spec.tensors().items()
    }
    assert torch.equal(packed.dequantized_weight(), dequantized_weight(state))


def test_the_spec_survives_json():
    spec = LayerSpec("conv2d", 40, 12, 4, bits_a=8, act="static", rows=1, split=24)
    assert LayerSpec.from_dict(spec.to_dict()) == spec
    assert "split" not in LayerSpec("linear", 40, 12, 4).to_dict()


@pytest.mark.parametrize("split", [0, 40, 41])
def test_impossible_splits_are_refused(split):
    with pytest.raises(ValueError, match="cannot be split"):
        LayerSpec("linear", 40, 12, 4, split=split).tensors()


def test_a_denoiser_packed_in_memory_equals_the_simulated_one(tiny_unet, make_state):
    state = make_state(tiny_unet, skip="attn", split=True)
    assert any(layer.decision.split for layer in state.layers.values())
    simulation, packed = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)
    apply_state_(simulation, state)
    pack_denoiser_(packed, state)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for timestep in (800, torch.tensor(0), torch.tensor([430, 10])):
        assert torch.equal(packed(x, timestep).sample, simulation(x, timestep).sample)
