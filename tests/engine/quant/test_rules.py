"""The bit policy on real diffusers classes, built on the meta device."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.config import ActivationPolicy, QuantizeSpec, RoleMatch, Rule, WeightPolicy
from qdm_cli.engine.quant.rules import resolve


@pytest.fixture(scope="module")
def unet():
    with torch.device("meta"):
        return UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(32, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )


@pytest.fixture(scope="module")
def dit():
    with torch.device("meta"):
        return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=16, num_layers=2, sample_size=8, in_channels=4)


def by_name(denoiser, **fields):
    return {d.name: d for d in resolve(denoiser, QuantizeSpec(**fields))}


def test_every_linear_and_conv_is_decided(unet, dit):
    for model in (unet, dit):
        names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
        assert set(by_name(model)) == names


def test_efficientdm_policy_keeps_edges_at_8_bits_and_shortcuts_in_full_precision(unet):
    got = by_name(unet, activations=ActivationPolicy(bits=4, timestep_aware=True))
    for name in ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"):
        assert (got[name].bits_w, got[name].bits_a, got[name].timestep_aware) == (8, 8, False), name
    for name in ("down_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv"):
        assert "kept" in got[name].skipped_why
    inner = got["down_blocks.1.resnets.0.conv1"]
    assert (inner.bits_w, inner.bits_a, inner.timestep_aware, inner.skipped_why) == (4, 4, True, None)


def test_first_matching_rule_wins_before_the_policy(unet):
    rules = (Rule(match="conv_in", bits=2), Rule(match="conv_*|mid_block.*", weights=3, activations=6))
    got = by_name(unet, rules=rules)
    assert got["conv_in"].bits_w == 2 and got["conv_in"].rule == "quantize.rules.0"
    assert (got["conv_out"].bits_w, got["conv_out"].bits_a) == (3, 6)
    assert got["mid_block.resnets.0.conv1"].bits_w == 3


def test_structural_match(unet, dit):
    got = by_name(unet, rules=(Rule(match=RoleMatch(type="Conv2d", kernel=1), skip=True, why="thin"),), policy="all")
    thin = [d for d in got.values() if d.type == "Conv2d" and d.shape[-1] == 1]
    assert thin and all(d.skipped_why == "thin" for d in thin)
    got = by_name(dit, rules=(Rule(match=RoleMatch(role="attention.qkv"), bits=6),))
    assert {d.bits_w for name, d in got.items() if "attn1.to_" in name and "out" not in name} == {6}


@pytest.mark.parametrize("match", ["down_blocks.0.resnet.*", RoleMatch(role="modulation"), RoleMatch(type="Conv2d", kernel=7)], ids=str)
def test_a_rule_that_matches_nothing_is_refused(unet, match):
    with pytest.raises(InputError, match=r"quantize\.rules\.1.*matches no layer"):
        resolve(unet, QuantizeSpec(rules=(Rule(match="conv_in", bits=8), Rule(match=match, bits=8))))


def test_the_nearest_module_names_are_suggested(unet):
    with pytest.raises(InputError, match=r"mid_block\.resnets\.0\.conv1"):
        resolve(unet, QuantizeSpec(rules=(Rule(match="mid_block.resnet.0.conv1", bits=8),)))


def test_a_group_size_that_does_not_fit_names_the_layer(unet):
    with pytest.raises(InputError, match=r"conv_in: group size 32 does not divide its 3 inputs"):
        resolve(unet, QuantizeSpec(weights=WeightPolicy(granularity="group", group_size=32), policy="all"))


def test_nothing_left_to_quantize_is_refused(unet):
    with pytest.raises(InputError, match="no layer to quantize"):
        resolve(unet, QuantizeSpec(rules=(Rule(match="*", skip=True),)))
    with pytest.raises(InputError, match="nothing to quantize"):
        resolve(nn.Sequential(nn.GroupNorm(2, 4)), QuantizeSpec())
