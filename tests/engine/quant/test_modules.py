"""Quantized layers against the integer identity in int64 (quantization spec 1.3)."""

import pytest
import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.grid import IntGrid, PerTensor, QParams, choose_qparams, quantize
from qdm_cli.engine.quant.modules import CodedWeight, build_layer, weight_granularity
from qdm_cli.engine.quant.report import dequantized_weight
from qdm_cli.engine.quant.state import LayerDecision, LayerState
from qdm_cli.engine.quant.state_apply import scales_of


def make_state(module: nn.Module, x: torch.Tensor, **fields) -> LayerState:
    weight = module.weight.detach()
    kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
    decision = LayerDecision("layer", kind, tuple(weight.shape), "other", **({"bits_w": 4, "bits_a": 4} | fields))
    granularity = weight_granularity(decision)
    params = choose_qparams(weight, IntGrid(decision.bits_w), granularity, symmetric=decision.symmetric)
    act = choose_qparams(x, IntGrid(decision.bits_a or 8), PerTensor())
    has_act = decision.bits_a is not None and decision.act_mode == "static"
    return LayerState(
        decision,
        quantize(weight, params, IntGrid(decision.bits_w), granularity),
        params.scale,
        params.zero_point.to(torch.int8),
        module.bias.detach(),
        act.scale.reshape(1) if has_act else None,
        act.zero_point.reshape(1).to(torch.int8) if has_act else None,
    )


def layer_of(module: nn.Module, state: LayerState) -> nn.Module:
    return build_layer(module, state.decision, CodedWeight(state), state.bias, scales_of(state), StepContext())


def int64_oracle(module: nn.Module, state: LayerState, x: torch.Tensor) -> torch.Tensor:
    grid = IntGrid(state.decision.bits_a)
    params = QParams(state.act_scale[0], state.act_zero_point[0].float())
    codes = quantize(x, params, grid).double() - state.act_zero_point.double()
    shape = [-1] + [1] * (state.codes.ndim - 1)
    weight = state.codes.double() - state.weight_zero_point.double().view(shape)
    if isinstance(module, nn.Conv2d):
        total = nn.functional.conv2d(codes, weight, None, module.stride, module.padding, module.dilation, module.groups)
        per_channel = (-1, 1, 1)
    else:
        total, per_channel = codes @ weight.T, (-1,)
    scale = state.act_scale.double() * state.weight_scale.double()
    return total * scale.view(per_channel) + state.bias.double().view(per_channel)


LAYERS = {
    "linear K=1": (nn.Linear(1, 3), (5, 1)),
    "linear K=31": (nn.Linear(31, 7), (2, 5, 31)),
    "linear K=1280": (nn.Linear(1280, 16), (4, 1280)),
    "conv 3x3": (nn.Conv2d(8, 12, 3, padding=1), (2, 8, 9, 9)),
    "conv stride 2": (nn.Conv2d(8, 4, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "conv dilated groups": (nn.Conv2d(8, 4, 3, padding=2, dilation=2, groups=2), (2, 8, 9, 9)),
}


@pytest.mark.parametrize("bits", [(4, 4), (4, 8), (8, 8)], ids=["W4A4", "W4A8", "W8A8"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", LAYERS)
def test_layer_equals_the_integer_formula(name, symmetric, bits):
    torch.manual_seed(0)
    module, shape = LAYERS[name]
    x = torch.randn(shape) + 0.7  # an off-centre input makes the zero point matter at padded borders
    state = make_state(module, x, bits_w=bits[0], bits_a=bits[1], symmetric=symmetric)
    expected = int64_oracle(module, state, x)
    got = layer_of(module, state)(x).double()
    assert (got - expected).abs().max() <= 1e-6 * expected.abs().max()


def test_group_scales_and_float_activations():
    torch.manual_seed(0)
    module, x = nn.Linear(64, 8), torch.randn(3, 64)
    state = make_state(module, x, granularity="group", group_size=16, bits_a=None)
    assert state.weight_scale.shape == (8, 4)
    expected = x @ dequantized_weight(state).T + module.bias
    assert torch.allclose(layer_of(module, state)(x), expected, atol=1e-6)


@pytest.mark.parametrize(
    "module,shape", [(nn.Linear(32, 8), (2, 3, 32)), (nn.Conv2d(4, 8, 3, padding=1), (2, 4, 6, 6))], ids=["token", "sample"]
)
def test_dynamic_activations_do_not_depend_on_the_rest_of_the_batch(module, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    layer = layer_of(module, make_state(module, x, bits_a=8, act_mode="dynamic"))
    louder = x.clone()
    louder[1] *= 100
    assert torch.equal(layer(x)[0], layer(louder)[0])
    assert (layer(x) - module(x)).abs().max() < 0.4 * module(x).abs().max()
