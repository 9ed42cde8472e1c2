"""QALoRA, RowAdam and the student (quantization spec 8.2, EfficientDM)."""

import pytest
import torch
from torch import nn

from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.grid import QParams, broadcast
from qdm_cli.engine.quant.modules import weight_granularity
from qdm_cli.engine.quant.qalora import QALoRAWeight, with_rows
from qdm_cli.engine.quant.row_adam import RowAdam
from qdm_cli.engine.quant.state import LayerDecision, QuantState


def state_of(module, bits=4, **fields):
    kind = "Conv2d" if isinstance(module, nn.Conv2d) else "Linear"
    decision = LayerDecision("layer", kind, tuple(module.weight.shape), "resnet", bits_w=bits, bits_a=4, **fields)
    return code_layer(module, decision, RangeRule("max"), QParams(torch.ones(3), torch.zeros(3)))


def weight_of(module, state, base="fp", rank=4):
    rng = torch.Generator().manual_seed(0)
    return QALoRAWeight(state, module.weight.detach() if base == "fp" else None, rank, rng)


@pytest.mark.parametrize("module", [nn.Linear(24, 12), nn.Conv2d(6, 12, 3)], ids=["linear", "conv"])
@pytest.mark.parametrize("base", ["fp", "int"])
def test_before_training_the_codes_are_those_of_calibration(module, base):
    state = state_of(module)
    assert torch.equal(weight_of(module, state, base).codes(), state.codes)


def test_the_merged_kernel_equals_two_convolutions():
    conv = nn.Conv2d(6, 12, 3, bias=False)
    weight = weight_of(conv, state_of(conv))
    torch.nn.init.normal_(weight.lora_b)
    x = torch.randn(2, 6, 8, 8)
    rank = weight.lora_a.shape[0]
    inner = nn.functional.conv2d(x, weight.lora_a.view(rank, 6, 3, 3))
    expected = conv(x) + nn.functional.conv2d(inner, weight.lora_b.view(12, rank, 1, 1))
    assert torch.allclose(nn.functional.conv2d(x, weight.merged()), expected, atol=1e-5)


@pytest.mark.parametrize("group", [None, 8], ids=["channel", "group"])
def test_exported_codes_are_those_the_forward_multiplies_with(group):
    linear = nn.Linear(24, 12)
    state = state_of(linear, granularity="group" if group else "channel", group_size=group)
    weight = weight_of(linear, state)
    with torch.no_grad():
        weight.lora_b.normal_(std=0.5)
        weight.scale.mul_(1.1)
    centred, _ = weight()
    zero = broadcast(weight.zero_point, centred.shape, weight_granularity(state.decision))
    assert torch.equal(weight.codes().float() - zero, centred.detach())
    assert not torch.equal(weight.codes(), state.codes)


def test_gradients_reach_adapter_and_scale_but_not_the_base():
    linear = nn.Linear(24, 12)
    weight = weight_of(linear, state_of(linear))
    weight.scale.requires_grad_(True)
    centred, scale = weight()
    (centred * scale[:, None]).square().sum().backward()
    assert weight.lora_b.grad.abs().sum() > 0 and weight.scale.grad.abs().sum() > 0
    assert {name for name, _ in weight.named_parameters()} == {"scale", "lora_a", "lora_b"}


@pytest.mark.parametrize("base,shares", [("fp", (4.0, 7.9, 19.9, 38.7)), ("int", (0.0, 0.0, 4.5, 31.5))])
def test_share_of_codes_that_an_update_changes(base, shares):
    """Specification 2.5 (2): an integer base sits on the grid, so small updates change nothing."""
    torch.manual_seed(0)
    linear = nn.Linear(512, 256)
    state = state_of(linear)
    weight = weight_of(linear, state, base, rank=64)
    for relative, share in zip((0.05, 0.1, 0.25, 0.5), shares, strict=True):
        with torch.no_grad():
            weight.lora_b.normal_()
            update = weight.lora_b @ weight.lora_a
            weight.lora_b *= relative * float(state.weight_scale.mean()) / float(update.square().mean().sqrt())
        changed = 100 * float((weight.codes() != state.codes).float().mean())
        assert changed == pytest.approx(share, abs=2.0), relative


def test_idle_rows_do_not_move():
    table = nn.Parameter(torch.zeros(5))
    optimizer = RowAdam([table], lr=0.1)
    for row in (1, 1, 3):
        table.grad = torch.zeros(5)
        table.grad[row] = 2.0
        optimizer.step()
    assert table[[0, 2, 4]].tolist() == [0.0, 0.0, 0.0]
    assert float(table[1].detach()) == pytest.approx(-0.2, rel=1e-4) and float(table[3].detach()) == pytest.approx(-0.1, rel=1e-4)


def test_touched_rows_follow_adam():
    torch.manual_seed(0)
    start, gradients = torch.randn(4), torch.randn(6, 4)
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    a, b = RowAdam([mine], lr=0.01), torch.optim.Adam([theirs], lr=0.01)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    assert torch.allclose(mine, theirs, atol=1e-6)


def test_a_constant_gradient_factor_is_a_no_op_under_adam_and_a_rate_factor_is_not():
    """Specification 2.5 (1): why the scale-aware form changes learning rates and not gradients."""

    def run(factor: float, rate: float) -> torch.Tensor:
        parameter = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([parameter], lr=rate, weight_decay=0.0, eps=0.0)
        for _ in range(5):
            parameter.grad = factor * parameter.detach() * torch.tensor([1.0, -2.0, 3.0])
            optimizer.step()
        return parameter.detach()

    assert torch.allclose(run(1.0, 1e-2), run(37.0, 1e-2), atol=1e-6)
    assert not torch.allclose(run(1.0, 1e-2), run(1.0, 2e-2), atol=1e-3)


def test_rows_for_other_timesteps_start_as_their_nearest():
    linear = nn.Linear(4, 4)
    layer = state_of(linear)
    layer = type(layer)(
        **{**layer.__dict__, "act_scale": torch.tensor([1.0, 2.0, 3.0]), "act_zero_point": torch.tensor([0, 1, 2]).to(torch.int8)}
    )
    state = QuantState({"layer": layer}, step_keys=torch.tensor([1.0, 501.0, 951.0], dtype=torch.float64))
    moved = with_rows(state, [11.0, 401.0, 901.0, 951.0])
    assert moved.step_keys.tolist() == [11.0, 401.0, 901.0, 951.0]
    assert moved.layers["layer"].act_scale.tolist() == [1.0, 2.0, 3.0, 3.0]
    assert moved.layers["layer"].act_zero_point.tolist() == [0, 1, 2, 2]
