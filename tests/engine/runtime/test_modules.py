"""Packed layers against integer arithmetic in float64 and against the simulated layers that they must equal."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.modules import CodedWeight, build_layer
from qdm_cli.engine.quant.state import LayerState
from qdm_cli.engine.quant.state_apply import apply_state_, scales_of
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_spec, packed_from_state

LAYERS = {
    "linear": lambda: (nn.Linear(40, 24), torch.randn(3, 5, 40)),
    "linear-no-bias": lambda: (nn.Linear(70, 9, bias=False), torch.randn(4, 70)),
    "conv3x3": lambda: (nn.Conv2d(16, 12, 3, padding=1), torch.randn(2, 16, 7, 6)),
    "conv-stride": lambda: (nn.Conv2d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 9, 8)),
    "conv-dilated": lambda: (nn.Conv2d(8, 6, (3, 1), dilation=(2, 1), padding=(2, 0)), torch.randn(2, 8, 9, 8)),
    "conv-grouped": lambda: (nn.Conv2d(16, 8, 3, padding=1, groups=4), torch.randn(2, 16, 5, 5)),
    "conv1x1": lambda: (nn.Conv2d(72, 10, 1, bias=False), torch.randn(2, 72, 3, 3)),
}
POLICIES = {
    "w4a8": {},
    "w4a4": {"bits_a": 4},
    "w8a8": {"bits_w": 8},
    "w3a5": {"bits_w": 3, "bits_a": 5},
    "symmetric": {"symmetric": True, "act_symmetric": True},
    "weight-only": {"bits_a": None},
    "dynamic": {"act_mode": "dynamic"},
    "dynamic-symmetric": {"act_mode": "dynamic", "act_symmetric": True},
    "groups": {"group_size": 4},
    "groups-weight-only": {"group_size": 2, "bits_a": None},
    "pre-scale": {"bits_a": 4, "pre_scale": True},
    "pre-scale-dynamic": {"act_mode": "dynamic", "pre_scale": True},
    "pre-scale-weight-only": {"bits_a": None, "pre_scale": True},
}


def build(kind: str, make_layer_state, rows: int = 1, **policy):
    torch.manual_seed(7)
    original, x = LAYERS[kind]()
    group = policy.get("group_size")
    if group and original.weight.shape[1] % group:
        policy["group_size"] = 2
    return original, make_layer_state(original, rows, **policy), x


def simulated(original: nn.Module, state: LayerState, step: StepContext) -> nn.Module:
    return build_layer(original, state.decision, CodedWeight(state), state.bias, scales_of(state), step, state.pre_scale)


def oracle(original: nn.Module, state: LayerState, x: torch.Tensor, row: int = 0) -> torch.Tensor:
    """The integer formula in float64, for static activations and scales per channel."""
    z, s = state.act_zero_point[row].double(), state.act_scale[row].double()
    half = 2 ** (state.decision.bits_a - 1)
    if state.pre_scale is not None:
        x = x * state.pre_scale.view(-1, *[1] * (2 * (x.ndim == 4)))
    q = torch.round((x.float() * state.act_scale[row].reciprocal()).double().clamp(-half - z, half - 1 - z))
    shape = (-1, *[1] * (state.codes.ndim - 1))
    w = state.codes.double() - state.weight_zero_point.double().view(shape)
    if isinstance(original, nn.Linear):
        y = F.linear(q, w) * (s * state.weight_scale.double())
        return y if state.bias is None else y + state.bias.double()
    y = F.conv2d(q, w, None, original.stride, original.padding, original.dilation, original.groups)
    y = y * (s * state.weight_scale.double()).view(-1, 1, 1)
    return y if state.bias is None else y + state.bias.double().view(-1, 1, 1)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", ["w4a8", "w4a4", "w8a8", "w3a5", "symmetric", "pre-scale"])
def test_outputs_are_the_integer_formula(kind: str, policy: str, make_layer_state) -> None:
    original, state, x = build(kind, make_layer_state, **POLICIES[policy])
    y, want = packed_from_state(state, original, 1)(x), oracle(original, state, x)
    assert y.shape == want.shape
    # two float32 roundings of the epilogue; a code or an accumulator off by one is 1e-3 or more
    assert ((y.double() - want).norm() / want.norm()).item() < 2e-7


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_simulated_and_packed_layers_agree_to_the_bit(kind: str, policy: str, make_layer_state) -> None:
    original, state, x = build(kind, make_layer_state, **POLICIES[policy])
    assert torch.equal(packed_from_state(state, original, 1)(x), simulated(original, state, StepContext())(x))


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("timestep", [100.0, 640, torch.tensor([900.0, 130.0])], ids=["row", "between", "per-sample"])
@pytest.mark.parametrize("kind", ["linear", "conv3x3"])
@pytest.mark.parametrize("policy", ["w4a8", "symmetric", "pre-scale"])
def test_step_rows(kind: str, mode, timestep, policy: str, make_layer_state) -> None:
    original, state, x = build(kind, make_layer_state, rows=3, **POLICIES[policy])
    x = x[:2]
    step = StepContext(torch.tensor([900.0, 500.0, 100.0]), mode)
    step.set_timestep(timestep)
    packed = packed_from_state(state, original, 3)
    packed.step = step
    y = packed(x)
    assert torch.equal(y, simulated(original, state, step)(x))
    if timestep == 100.0 if isinstance(timestep, float) else False:
        want = oracle(original, state, x, row=2)
        assert ((y.double() - want).norm() / want.norm()).item() < 2e-7


@pytest.mark.parametrize("kind", ["linear", "conv3x3", "conv-grouped"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_stored_codes_come_back(kind: str, bits: int, make_layer_state) -> None:
    original, state, _ = build(kind, make_layer_state, bits_w=bits)
    packed = packed_from_state(state, original, 1)
    assert torch.equal(packed.codes(), state.codes)
    assert packed.weight.dtype == (torch.uint8 if bits <= 4 else torch.int8)


def test_few_channels_are_stored_without_waste(make_layer_state) -> None:
    conv = nn.Conv2d(32, 32, 3)
    packed = packed_from_state(make_layer_state(conv), conv, 1)
    # rows of 9 * 32 = 288 codes, padded to 320: 160 bytes; padding each of the nine taps to 64 would take 288
    assert packed.weight.shape == (32, 160)


def test_outputs_keep_the_dtype_of_the_input_and_are_channels_last(make_layer_state) -> None:
    original, state, x = build("conv3x3", make_layer_state)
    packed = packed_from_state(state, original, 1)
    last = x.contiguous(memory_format=torch.channels_last)
    for layer in (packed, simulated(original, state, StepContext())):
        assert all(layer(one).is_contiguous(memory_format=torch.channels_last) for one in (x, last))
    assert torch.equal(packed(last), packed(x))
    half = packed(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, packed(x.half().float()).half(), rtol=0, atol=0)


def test_casts_leave_scales_in_float32(make_layer_state) -> None:
    original, state, x = build("linear", make_layer_state)
    packed = packed_from_state(state, original, 1)
    before = packed(x)
    packed.half()
    assert {packed.weight_scale.dtype, packed.act_scale.dtype, packed.bias.dtype} == {torch.float32}
    assert torch.equal(packed(x), before)


def test_a_copy_and_a_reload_compute_with_their_own_weights(make_layer_state) -> None:
    original, state, x = build("linear", make_layer_state)
    packed = packed_from_state(state, original, 1)
    before = packed(x)
    twin = copy.deepcopy(packed)
    assert torch.equal(twin(x), before)
    twin.load_buffer_("weight_scale", packed.weight_scale * 2)
    doubled = (before - packed.bias) * 2 + packed.bias
    torch.testing.assert_close(twin(x), doubled)
    assert torch.equal(packed(x), before)
    twin.load_state_dict(packed.state_dict())
    assert torch.equal(twin(x), before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(2, 2, dtype=torch.uint8), "weight"),
        ("weight_scale", torch.zeros(24, dtype=torch.int8), "float32"),
        ("act_zero_point", torch.zeros(1, dtype=torch.int8), "none"),
    ],
)
def test_wrong_tensors_are_refused(name: str, value: torch.Tensor, message: str) -> None:
    layer = packed_from_spec(LayerSpec("linear", 40, 24, 4, act="static", bits_a=8, act_symmetric=True, rows=1))
    with pytest.raises(ValueError, match=message):
        layer.load_buffer_(name, value)


def test_sums_that_overflow_int32_are_refused(make_layer_state) -> None:
    linear = nn.Linear(33_026, 1)
    state = make_layer_state(linear, bits_w=8)
    with pytest.raises(InputError, match=r"K = 33026 .* \(limit 33025\)"):
        packed_from_state(state, linear, 1)


def test_reflecting_convolutions_are_refused(make_layer_state) -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
    with pytest.raises(InputError, match="reflect"):
        packed_from_state(make_layer_state(conv), conv, 1)


def test_the_spec_survives_json_and_later_keys() -> None:
    spec = LayerSpec("conv2d", 8, 6, 4, bits_a=8, kernel=(3, 3), stride=(2, 2), padding=(1, 1), act="static", rows=5, bias=False)
    assert LayerSpec.from_dict({**spec.to_dict(), "invented_later": 1}) == spec
    with pytest.raises(ValueError, match="bits_w"):
        LayerSpec.from_dict({"kind": "linear", "in": 3, "out": 4})


@pytest.mark.parametrize("policy", ["w4a8", "w4a4", "dynamic", "weight-only", "pre-scale"])
def test_a_denoiser_packed_in_memory_equals_the_simulated_one(policy: str, tiny_unet, make_state) -> None:
    state = make_state(tiny_unet, **POLICIES[policy])
    simulation, packed = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)
    apply_state_(simulation, state)
    pack_denoiser_(packed, state)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for timestep in (800, torch.tensor(0), torch.tensor([430, 10])):
        assert torch.equal(packed(x, timestep).sample, simulation(x, timestep).sample)


def test_every_call_reads_its_own_step(tiny_unet, make_state) -> None:
    pack_denoiser_(tiny_unet, make_state(tiny_unet))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    forwards = [tiny_unet(x, t).sample for t in (800, 600, 400)]
    backwards = [tiny_unet(x, timestep=t).sample for t in (400, 600, 800)]
    assert all(torch.equal(a, b) for a, b in zip(forwards, reversed(backwards), strict=True))
    # Heun asks twice for one step; fractional values fall on the nearest row
    assert torch.equal(tiny_unet(x, 600).sample, tiny_unet(x, torch.tensor(600.0)).sample)
    mixed = tiny_unet(x, torch.tensor([800, 400])).sample
    torch.testing.assert_close(mixed[1:], forwards[2][1:], rtol=1e-4, atol=1e-4)


def test_pack_refuses_the_state_of_another_model(tiny_unet, make_state) -> None:
    state = make_state(tiny_unet)
    with pytest.raises(InputError, match="another model"):
        pack_denoiser_(nn.Sequential(nn.Linear(3, 3)), state)
