"""Packed layers on the Triton kernels against the simulation that they must equal, and what they keep in memory."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.modules import CodedWeight, build_layer
from qdm_cli.engine.quant.state import LayerState
from qdm_cli.engine.quant.state_apply import scales_of
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.modules import packed_from_state
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import share_inputs_

LAYERS = {
    "linear": lambda: (nn.Linear(64, 24), torch.randn(2, 5, 64)),
    "linear-odd": lambda: (nn.Linear(72, 9, bias=False), torch.randn(4, 72)),
    "conv3x3": lambda: (nn.Conv2d(64, 12, 3, padding=1), torch.randn(2, 64, 5, 4)),
    "conv-stride": lambda: (nn.Conv2d(16, 6, 3, stride=2, padding=1), torch.randn(2, 16, 6, 5)),
    "conv1x1": lambda: (nn.Conv2d(64, 10, 1, bias=False), torch.randn(2, 64, 3, 3)),
}
POLICIES = {
    "w4a8": {},
    "w8a8": {"bits_w": 8},
    "w3a5": {"bits_w": 3, "bits_a": 5},
    "w4a8-symmetric": {"symmetric": True, "act_symmetric": True},
    "w8a8-symmetric": {"bits_w": 8, "symmetric": True},
    "dynamic": {"act_mode": "dynamic"},
    "dynamic-symmetric": {"act_mode": "dynamic", "act_symmetric": True, "symmetric": True},
}
KEYS = torch.tensor([900.0, 500.0, 100.0])


def simulated(original: nn.Module, state: LayerState, step: StepContext) -> nn.Module:
    return build_layer(original, state.decision, CodedWeight(state), state.bias, scales_of(state), step)


def pair(kind: str, make_layer_state, mode: str = "nearest", **policy) -> tuple[PackedLayer, nn.Module, torch.Tensor]:
    """A packed layer, its simulation at the same step, and an input."""
    torch.manual_seed(7)
    original, x = LAYERS[kind]()
    state = make_layer_state(original, 3, **policy)
    step = StepContext(KEYS, mode)
    packed = packed_from_state(state, original, 3)
    packed.step = step
    packed.settle_()
    return packed, simulated(original, state, step), x


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("policy", POLICIES)
def test_layers_equal_their_simulation_to_the_bit(kind: str, policy: str, make_layer_state) -> None:
    packed, want, x = pair(kind, make_layer_state, **POLICIES[policy])
    packed.step.set_timestep(torch.tensor(120.0))
    assert packed.form.choice.kernel == "integer"
    assert torch.equal(packed(x), want(x))
    half = packed(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half, want(x.half()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("timestep", [900, torch.tensor([640.0]), torch.tensor([900.0, 130.0])], ids=["number", "one", "per-sample"])
@pytest.mark.parametrize("kind", ["linear", "conv1x1"])
def test_every_kind_of_step(kind: str, timestep, mode, make_layer_state) -> None:
    packed, want, x = pair(kind, make_layer_state, mode)
    packed.step.set_timestep(timestep)
    assert torch.equal(packed(x), want(x))


@pytest.mark.parametrize("kind", ["linear", "conv3x3", "conv1x1"])
@pytest.mark.parametrize("policy", ["w4a8", "w8a8", "w4a8-symmetric", "w8a8-symmetric"])
def test_codes_lie_in_memory_once_and_packed(kind: str, policy: str, make_layer_state) -> None:
    packed, _, _ = pair(kind, make_layer_state, **POLICIES[policy])
    codes, state = packed.codes(), packed.form.prepared.state
    assert packed.weight.untyped_storage().data_ptr() == state.weight.untyped_storage().data_ptr()
    assert state.weight.dtype == (torch.uint8 if packed.spec.bits_w <= 4 else torch.int8)
    assert torch.equal(packed.to("cpu").codes(), codes)


def test_few_rows_and_float_activations_read_packed_weights(make_layer_state) -> None:
    packed, _, x = pair("linear", make_layer_state, symmetric=True)
    packed.set_mode_("auto")
    packed.place_(few_rows=True, dtype=torch.float16)
    assert packed.form.choice.kernel == "weights"
    want = torch.nn.functional.linear(x, packed.dequantized_weight(), packed.bias)
    torch.testing.assert_close(packed(x.half()).float(), want, rtol=5e-3, atol=5e-3)


def test_a_layer_that_integers_would_slow_keeps_its_float_weight(make_layer_state) -> None:
    packed, _, x = pair("linear", make_layer_state)
    packed.set_mode_("auto")
    packed.place_(few_rows=False, dtype=torch.float16)
    assert packed.form.weight.dtype == torch.float16
    want = torch.nn.functional.linear(x, packed.dequantized_weight(), packed.bias)
    torch.testing.assert_close(packed(x), want)
    torch.testing.assert_close(packed(x.half()).float(), want, rtol=5e-3, atol=5e-3)


class SelfAttention(nn.Module):
    def __init__(self, layers: list[PackedLayer]):
        super().__init__()
        self.to_q, self.to_k, self.to_v = layers

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.to_q(x), self.to_k(x), self.to_v(x)], -1)


@pytest.mark.parametrize("policy", ["w4a8-symmetric", "w8a8-symmetric", "w4a8"])
def test_queries_keys_and_values_are_one_product_over_one_copy_of_the_weights(policy: str, make_layer_state) -> None:
    pairs = [pair("linear", make_layer_state, **POLICIES[policy]) for _ in range(3)]
    x = pairs[0][2]
    want = torch.cat([simulation(x) for _, simulation, _ in pairs], -1)
    attention = SelfAttention([packed for packed, _, _ in pairs])
    assert share_inputs_(attention) == 3
    for _ in range(2):
        assert torch.equal(attention(x), want)
    storages = {packed.weight.untyped_storage().data_ptr() for packed, _, _ in pairs}
    assert len(storages) == 1
    assert torch.equal(pairs[1][0](x), pairs[1][1](x))


def test_layers_of_one_product_are_right_alone_where_only_some_fold_their_zero_points(make_layer_state) -> None:
    """Codes of the second fit into 4 bits without their zero points, those of the others do not: joined, its rows are plain codes too."""
    packed, simulations, x = [], [], LAYERS["linear"]()[1]
    for i in range(3):
        torch.manual_seed(7)
        original, step = LAYERS["linear"]()[0], StepContext(KEYS, "nearest")
        state = make_layer_state(original, 3)
        codes, zero = (state.codes.clamp(-3, 3), 2) if i == 1 else (state.codes.clone(), 3)
        codes[0, :2] = torch.tensor([-3, 3] if i == 1 else [-8, 7], dtype=codes.dtype)
        state = replace(state, codes=codes, weight_zero_point=torch.full_like(state.weight_zero_point, zero))
        packed.append(packed_from_state(state, original, 3))
        packed[-1].step = step
        packed[-1].settle_()
        simulations.append(simulated(original, state, step))
    assert [layer.form.prepared.state.centre is None for layer in packed] == [False, True, False]
    attention = SelfAttention(packed)
    share_inputs_(attention)
    assert torch.equal(attention(x), torch.cat([simulation(x) for simulation in simulations], -1))
    for layer, simulation in zip(packed, simulations, strict=True):
        layer.reuse = None
        assert torch.equal(layer(x), simulation(x))


def test_an_input_elsewhere_is_refused(make_layer_state) -> None:
    packed, _, x = pair("linear", make_layer_state)
    with pytest.raises(ValueError, match="the input is on meta, the layer on cpu: move one of them"):
        packed(x.to("meta"))


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_no_rows(shape: tuple[int, ...], make_layer_state) -> None:
    packed, _, _ = pair("linear", make_layer_state)
    assert packed(torch.zeros(shape)).shape == (*shape[:-1], 24)


def test_infinities_saturate_and_nan_stays_in_its_row(make_layer_state) -> None:
    packed, _, x = pair("linear", make_layer_state)
    tamed = x.clone()
    x[0, 0, :2], tamed[0, 0, :2] = torch.tensor([float("inf"), -float("inf")]), torch.tensor([1e30, -1e30])
    assert torch.equal(packed(x), packed(tamed))
    x[0, 1, 0] = float("nan")  # has no code: any will do
    got = packed(x)
    assert torch.equal(got[0, 2:], packed(tamed)[0, 2:])
    assert got.isfinite().all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_without_a_kernel_are_expanded_as_stored(kind: str, bits: int, symmetric: bool, make_layer_state) -> None:
    packed, _, x = pair(kind, make_layer_state, bits_w=bits, symmetric=symmetric, bits_a=None)
    for compiled in (False, True):
        with mock.patch.object(torch.compiler, "is_compiling", lambda compiled=compiled: compiled):
            weight, bias = gpu.expanded(packed, torch.float16)
        assert torch.equal(weight, packed.dequantized_weight().half())
        assert weight.ndim == 2 or weight.is_contiguous(memory_format=torch.channels_last)
    want = packed._apply_op(x, packed.dequantized_weight(), packed.bias)
    torch.testing.assert_close(packed(x.half()).float(), want, rtol=5e-3, atol=5e-3)
    assert packed(x.half()).dtype == torch.float16
    assert (bias is None) == (packed.bias is None)
