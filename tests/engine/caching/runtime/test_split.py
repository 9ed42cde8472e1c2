"""Both halves of a cut denoiser against the model itself, for every class that can be cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qdm_cli.engine.caching.runtime import SplitDenoiser, candidate_cuts, find_cut
from qdm_cli.engine.caching.runtime.blocks import block_list
from qdm_cli.engine.caching.runtime.unet import depth
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.tiny import tiny_denoiser

NETS = ("sd", "sd, odd size", "ddpm", "ddpm without a middle", "resnet resampling", "simple cross attention", "video", "motion")


def sample_of(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output.sample


def check(model: Any, place: Any, call: dict[str, Any], other: dict[str, Any]) -> None:
    """Full equals the model bit for bit; partial equals it where nothing changed, differs where x did, and leaves the tensor alone."""
    split = SplitDenoiser(model, find_cut(model, place))
    want = sample_of(model(**call))
    output, feature = split.full(**call)
    assert torch.equal(sample_of(output), want)
    if split.cut.kind == "unet_up":
        assert feature.shape[1] == split.cut.channels
        assert feature.shape[-1] == -(-call["sample"].shape[-1] // split.cut.downscale)
    before = feature.clone()
    again = sample_of(split.partial(feature, **call))
    torch.testing.assert_close(again, want, atol=1e-6, rtol=1e-5)
    reused = sample_of(split.partial(feature, **other))
    assert not torch.equal(reused, want)
    assert not torch.allclose(reused, sample_of(model(**other)), atol=1e-6)
    assert torch.equal(feature, before)
    assert torch.equal(sample_of(model(**call)), want), "the model itself changed"


@pytest.mark.parametrize("name", NETS)
@torch.no_grad()
def test_every_skip_branch(name: str, make_net: Callable[..., Any]) -> None:
    model, call = make_net(name)
    other = {**call, "sample": call["sample"].flip(0)}
    deepest = depth(model) - (model.mid_block is None)  # without a middle, the deepest partial call runs everything
    for m in {*range(1, min(6, deepest + 1)), *range(6, deepest + 1, 3)}:
        check(model, m, call, other)


EXECUTED = {  # caching spec 1.4
    1: {"conv_in", "up3.2"},
    2: {"conv_in", "down0.0", "up3.1", "up3.2"},
    3: {"conv_in", "down0.0", "down0.1", "up3.0", "up3.1", "up3.2"},
    4: {"conv_in", "down0.0", "down0.1", "down0.sampler", "up2.2", "up2.sampler", "up3.0", "up3.1", "up3.2"},
}
EVERYTHING = (
    {"conv_in", "conv_out", "time_embedding"}
    | {f"down{b}.{layer}" for b in range(4) for layer in (0, 1)}
    | {f"down{b}.sampler" for b in range(3)}
    | {f"up{b}.{layer}" for b in range(4) for layer in (0, 1, 2)}
    | {f"up{b}.sampler" for b in range(3)}
)


def executed(model: Any, run: Callable[[], Any]) -> set[str]:
    """Layers that a call runs; a residual layer and its attention must run together."""
    seen: set[str] = set()
    parts = {name: module for name, module in model.named_modules() if not list(module.children()) or "attentions" in name}
    hooks = [module.register_forward_hook(lambda m, a, o, name=name: seen.add(name)) for name, module in parts.items()]
    run()
    for hook in hooks:
        hook.remove()

    def label(name: str) -> str:
        words = name.split(".")
        if words[0] in ("down_blocks", "up_blocks"):
            side = words[0].split("_")[0]
            return f"{side}{words[1]}.sampler" if "samplers" in words[2] else f"{side}{words[1]}.{words[3]}"
        return words[0]

    labels = {label(name) for name in seen}
    for place in labels:
        if place[-1] in "012" and place[:5] not in ("down3",) and place[:3] != "up0":  # the outer levels have attention
            side, layer = place.split(".")
            block = f"{side[:-1]}_blocks.{side[-1]}"
            assert any(name.startswith(f"{block}.resnets.{layer}.") for name in seen)
            assert any(name.startswith(f"{block}.attentions.{layer}.") for name in seen)
    return labels


@pytest.mark.parametrize("m", [1, 2, 3, 4, 12])
@torch.no_grad()
def test_layers_of_a_partial_call(m: int, make_net: Callable[..., Any]) -> None:
    model, call = make_net("sd")
    split = SplitDenoiser(model, find_cut(model, m))
    feature = split.full(**call)[1]
    labels = executed(model, lambda: split.partial(feature, **call))
    head = {"time_embedding", "conv_norm_out", "conv_act", "conv_out", "time_proj"}
    assert head - {"time_proj"} <= labels
    assert labels - head == (EXECUTED[m] if m in EXECUTED else EVERYTHING - head)


TRANSFORMERS = {
    "dit": lambda g: {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([401, 401]),
        "class_labels": torch.tensor([3, 5]),
    },
    "pixart": lambda g: {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([401, 401]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    },
    "sd3": lambda g: {
        "hidden_states": torch.randn(2, 16, 8, 8, generator=g),
        "timestep": torch.tensor([401.0, 401.0]),
        "encoder_hidden_states": torch.randn(2, 5, 64, generator=g),
        "pooled_projections": torch.randn(2, 64, generator=g),
    },
    "flux": lambda g: {
        "hidden_states": torch.randn(2, 16, 64, generator=g),
        "timestep": torch.tensor([0.4, 0.4]),
        "guidance": torch.tensor([3.5, 3.5]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=g),
        "pooled_projections": torch.randn(2, 32, generator=g),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
    },
}


@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_every_block_range(name: str) -> None:
    model = tiny_denoiser(name).eval()
    call = TRANSFORMERS[name](torch.Generator().manual_seed(3))
    other = {**call, "hidden_states": call["hidden_states"].flip(0)}
    count = len(block_list(model))
    for first in range(count):
        for end in range(first + 1, count + 1):
            check(model, (first, end), call, other)


@torch.no_grad()
def test_blocks_of_a_partial_call_do_not_run() -> None:
    model = tiny_denoiser("flux").eval()
    call = TRANSFORMERS["flux"](torch.Generator().manual_seed(3))
    split = SplitDenoiser(model, find_cut(model, (1, None)))
    feature = split.full(**call)[1]
    seen: list[str] = []
    for name, module in model.named_modules():
        if not list(module.children()):
            module.register_forward_hook(lambda m, a, o, name=name: seen.append(name))
    split.partial(feature, **call)
    assert any(name.startswith("transformer_blocks.0") for name in seen)
    assert not any(name.startswith("single_transformer_blocks") for name in seen)


@pytest.mark.parametrize("m", [2, 4, 7, 12])
@torch.no_grad()
def test_controlnet_residuals(m: int, make_net: Callable[..., Any]) -> None:
    """All of them in a full call; in a partial one those of the layers that run."""
    model, call = make_net("sd")
    rng = torch.Generator().manual_seed(5)
    shapes: list[torch.Size] = []
    probe = model.mid_block.register_forward_hook(lambda m, a, o: shapes.append(o.shape))
    skips: list[torch.Size] = []
    hooks = [b.register_forward_hook(lambda m, a, o: skips.extend(s.shape for s in o[1])) for b in model.down_blocks]
    model(**call)
    for hook in (probe, *hooks):
        hook.remove()
    residuals = [torch.randn(s, generator=rng) for s in (torch.Size((2, 4, 8, 8)), *skips)]
    call |= {"down_block_additional_residuals": tuple(residuals), "mid_block_additional_residual": torch.randn(shapes[0], generator=rng)}
    check(model, m, call, {**call, "sample": call["sample"].flip(0)})


@pytest.mark.parametrize("m", [1, 3, 4, 8, 12])
@torch.no_grad()
def test_adapter_residuals(m: int, make_net: Callable[..., Any]) -> None:
    """T2I-Adapter adds one tensor per down block, the last one in place: a partial call adds those of layers that run."""
    model, call = make_net("sd")
    rng = torch.Generator().manual_seed(5)
    sizes = [(4, 8), (8, 4), (8, 2), (12, 1)]
    states = [torch.randn(2, c, s, s, generator=rng) for c, s in sizes]

    def fresh(**changes: Any) -> dict[str, Any]:
        return {**call, **changes, "down_intrablock_additional_residuals": [state.clone() for state in states]}

    split = SplitDenoiser(model, find_cut(model, m))
    want = model(**fresh()).sample
    output, feature = split.full(**fresh())
    assert torch.equal(output.sample, want)
    before = feature.clone()
    partial = split.partial(feature, **fresh()).sample
    assert torch.equal(feature, before)
    torch.testing.assert_close(partial, want, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("m", [5, 8, 10, 12])
@torch.no_grad()
def test_freeu_writes_in_place_but_not_into_the_kept_tensor(m: int, make_net: Callable[..., Any]) -> None:
    model, call = make_net("sd")
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.4, b2=1.6)
    check(model, m, call, {**call, "sample": call["sample"].flip(0)})


@torch.no_grad()
def test_hooks_of_the_model_run_in_both_halves(make_net: Callable[..., Any]) -> None:
    model, call = make_net("ddpm")
    seen: list[float] = []
    split = SplitDenoiser(model, find_cut(model, 1))
    model.register_forward_pre_hook(lambda m, a, k: seen.append(float(k["timestep"])), with_kwargs=True)
    feature = split.full(**call)[1]
    split.partial(feature, **{**call, "timestep": torch.tensor(7)})
    assert seen == [401.0, 7.0]


@torch.no_grad()
def test_a_loaded_state_is_seen_by_both_halves(make_net: Callable[..., Any]) -> None:
    model, call = make_net("ddpm")
    split = SplitDenoiser(model, find_cut(model, 2))
    model.load_state_dict({name: value * 1.1 for name, value in model.state_dict().items()})
    model.double()
    call = {**call, "sample": call["sample"].double()}
    want = model(**call).sample
    output, feature = split.full(**call)
    assert torch.equal(output.sample, want)
    torch.testing.assert_close(split.partial(feature, **call).sample, want)


def test_candidates() -> None:
    assert [cut.m for cut in candidate_cuts(tiny_denoiser("sd"))] == [1, 2, 3]
    assert [cut.range for cut in candidate_cuts(tiny_denoiser("dit"))] == [(1, None)]


@pytest.mark.parametrize(
    "place, message", [(0, "skip branches 1 to 4"), (5, "skip branches 1 to 4"), ((0, 1), "no block cut")], ids=["zero", "deep", "range"]
)
def test_places_that_a_unet_lacks(place: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_cut(tiny_denoiser("sd"), place)


@pytest.mark.parametrize("place", [(2, None), (1, 1), (-1, 1), (0, 3)], ids=str)
def test_ranges_that_a_transformer_lacks(place: Any) -> None:
    with pytest.raises(InputError, match="has the blocks 0 to 1"):
        find_cut(tiny_denoiser("dit"), place)


def test_models_without_skip_branches() -> None:
    from diffusers import AutoencoderTiny, UNet2DModel

    with pytest.raises(InputError, match="no skip branches"):
        candidate_cuts(AutoencoderTiny())
    blocks = {"down_block_types": ("SkipDownBlock2D",), "up_block_types": ("SkipUpBlock2D",), "block_out_channels": (32,)}
    with pytest.raises(InputError, match="more than one tensor"):
        candidate_cuts(UNet2DModel(sample_size=8, **blocks))
    with pytest.raises(InputError, match="m=1"):
        find_cut(tiny_denoiser("dit"), 1)


def test_a_block_whose_forward_was_replaced_is_refused(make_net: Callable[..., Any]) -> None:
    model, _ = make_net("sd")
    model.up_blocks[3].forward = model.up_blocks[3].forward
    with pytest.raises(InputError, match="was replaced"):
        SplitDenoiser(model, find_cut(model, 2))
