"""Multiply-adds of published networks, counted from their configurations, against the tables of caching spec 1.5 and 1.6."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from qdm_cli.engine.caching.macs import CallMacs, count_by_module, mean_macs, meta_model
from qdm_cli.engine.caching.runtime import SplitDenoiser, find_cut
from qdm_cli.engine.caching.schedule import Cut, ModelRef, SamplerRef, schedule_from_refreshes
from qdm_cli.engine.models.tiny import tiny_denoiser

CROSS, PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
CROSS_UP, PLAIN_UP = "CrossAttnUpBlock2D", "UpBlock2D"
NETS: dict[str, tuple[str, dict[str, Any], int]] = {  # class, configuration, context length
    "sd15": ("UNet2DConditionModel", {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 77),
    "ldm4": (
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (192, 384, 576, 960),
            "down_block_types": (PLAIN, CROSS, CROSS, CROSS),
            "up_block_types": (CROSS_UP, CROSS_UP, CROSS_UP, PLAIN_UP),
            "cross_attention_dim": 512,
            "attention_head_dim": 32,
        },
        1,
    ),
    "cifar10": (
        "UNet2DModel",
        {
            "sample_size": 32,
            "block_out_channels": (128, 256, 256, 256),
            "down_block_types": (PLAIN, "AttnDownBlock2D", PLAIN, PLAIN),
            "up_block_types": (PLAIN_UP, PLAIN_UP, "AttnUpBlock2D", PLAIN_UP),
            "layers_per_block": 2,
            "attention_head_dim": None,
        },
        0,
    ),
    "lsun": (
        "UNet2DModel",
        {
            "sample_size": 256,
            "block_out_channels": (128, 128, 256, 256, 512, 512),
            "down_block_types": (PLAIN, PLAIN, PLAIN, PLAIN, "AttnDownBlock2D", PLAIN),
            "up_block_types": (PLAIN_UP, "AttnUpBlock2D", PLAIN_UP, PLAIN_UP, PLAIN_UP, PLAIN_UP),
            "layers_per_block": 2,
            "attention_head_dim": None,
        },
        0,
    ),
    "sdxl": (
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": (PLAIN, CROSS, CROSS),
            "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        77,
    ),
}
# Spec 1.5: full call, then partial ones by m; convolutions and linear layers, in units of 1e9.
FULL = {"sd15": 338.61, "ldm4": 99.77, "cifar10": 6.05, "lsun": 248.17, "sdxl": 2988.7}
PARTIAL = {
    "sd15": {1: 20.69, 2: 57.25, 3: 98.02, 4: 132.59, 5: 167.56, 6: 208.39, 9: 314.96, 12: 332.58},
    "ldm4": {1: 4.42, 2: 11.52, 3: 20.13, 4: 32.55, 5: 45.08, 6: 58.97, 9: 81.40, 12: 96.46},
    "cifar10": {1: 0.494, 2: 1.283, 3: 2.239, 4: 3.351, 5: 4.207, 6: 5.130, 9: 5.835, 12: 6.012},
    "lsun": {1: 31.59, 2: 82.06, 3: 132.52, 4: 152.39, 5: 165.01, 6: 180.31, 9: 221.18, 12: 233.12},
    "sdxl": {1: 49.03, 2: 127.9, 3: 223.5, 4: 392.1, 5: 592.6, 6: 816.5, 9: 2618.9},
}
ATTENTION = {
    "sd15": {0: 63.03, 1: 10.94, 2: 32.82, 3: 54.70},
    "sdxl": {0: 391.96, 1: 0.0, 2: 0.0, 3: 0.0, 4: 43.76, 5: 131.3},
}


@pytest.fixture(autouse=True)
def _without_poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing into gigabytes that a model without weights allocates for a moment would take minutes."""
    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, getattr(torch, name).__wrapped__)


@pytest.fixture(scope="module")
def counted() -> dict[str, CallMacs]:
    """Filled as nets are asked for, because each pass takes a second."""
    return {}


def macs_of(name: str, counted: dict[str, CallMacs]) -> CallMacs:
    if name not in counted:
        cls, config, context = NETS[name]
        model = meta_model(getattr(diffusers, cls), config)
        size, meta = config["sample_size"], torch.device("meta")
        call: dict[str, Any] = {
            "sample": torch.empty(1, model.config.in_channels, size, size, device=meta),
            "timestep": torch.empty((), device=meta),
        }
        if context:
            call["encoder_hidden_states"] = torch.empty(1, context, config["cross_attention_dim"], device=meta)
        if "addition_embed_type" in config:
            call["added_cond_kwargs"] = {"text_embeds": torch.empty(1, 1280, device=meta), "time_ids": torch.empty(1, 6, device=meta)}
        counted[name] = CallMacs(model, call)
    return counted[name]


@pytest.mark.parametrize("name", NETS)
def test_table_of_full_and_partial_calls(name: str, counted: dict[str, CallMacs]) -> None:
    macs = macs_of(name, counted)
    assert macs.full.layers / 1e9 == pytest.approx(FULL[name], rel=0.005)
    for m, wanted in PARTIAL[name].items():
        assert macs.partial(find_cut(macs.model, m)).layers / 1e9 == pytest.approx(wanted, rel=0.005), f"m={m}"


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_products(name: str, counted: dict[str, CallMacs]) -> None:
    macs = macs_of(name, counted)
    for m, wanted in ATTENTION[name].items():
        found = macs.partial(find_cut(macs.model, m)) if m else macs.full
        assert found.attention / 1e9 == pytest.approx(wanted, rel=0.005), f"m={m}"


@pytest.mark.parametrize(
    "name, m, calls, printed",
    [
        ("ldm4", 1, 250, {2: 52.12, 3: 36.48, 5: 23.50, 10: 13.97, 20: 9.39}),
        ("cifar10", 3, 100, {2: 4.15, 3: 3.54, 5: 3.01, 10: 2.63}),
        ("lsun", 3, 100, {2: 190.8, 3: 172.3, 5: 156.0}),
    ],
    ids=["ldm4", "cifar10", "lsun"],
)
def test_means_of_the_paper(name: str, m: int, calls: int, printed: dict[int, float], counted: dict[str, CallMacs]) -> None:
    """Uniform 1:N. Its row for Stable Diffusion at N = 5 is left out: no count gives it (spec 1.5)."""
    macs = macs_of(name, counted)
    full, partial = macs.full.layers / 1e9, macs.partial(find_cut(macs.model, m)).layers / 1e9
    for interval, wanted in printed.items():
        assert mean_macs(full, partial, -(-calls // interval), calls) == pytest.approx(wanted, rel=0.005), f"N={interval}"


def test_branch_sweep_of_the_paper(counted: dict[str, CallMacs]) -> None:
    """CIFAR-10, uniform 1:5, mean by m."""
    macs = macs_of("cifar10", counted)
    for m, wanted in {1: 1.60, 2: 2.24, 3: 3.01, 4: 3.89, 5: 4.58, 6: 5.31, 9: 5.88, 12: 6.03}.items():
        partial = macs.partial(find_cut(macs.model, m)).layers
        assert mean_macs(macs.full.layers, partial, 20, 100) / 1e9 == pytest.approx(wanted, abs=0.02)


def calls_of(name: str) -> dict[str, Any]:
    if name == "dit":
        return {"hidden_states": torch.zeros(2, 4, 8, 8), "timestep": torch.tensor([4, 4]), "class_labels": torch.tensor([3, 5])}
    return {"sample": torch.zeros(2, 4, 16, 16), "timestep": torch.tensor(4), "encoder_hidden_states": torch.zeros(2, 5, 32)}


@pytest.mark.parametrize("name, place", [("sd", 1), ("sd", 3), ("dit", (1, None))], ids=str)
@torch.no_grad()
def test_partial_counts_equal_a_counted_partial_call(name: str, place: Any) -> None:
    """Adding up the modules that run, against counting a partial call on real tensors."""
    model, call = tiny_denoiser(name), calls_of(name)
    split = SplitDenoiser(model, find_cut(model, place))
    feature = split.full(**call)[1]
    run = count_by_module(lambda: split.partial(feature, **call), split.partial_model).values()
    found = CallMacs(model, call).partial(split.cut)
    assert found.layers == sum(part.layers for part in run) > 0  # torch counts no attention products on a CPU


def test_mean_of_a_schedule() -> None:
    model = tiny_denoiser("sd")
    macs = CallMacs(model, calls_of("sd"))
    near, far = find_cut(model, 1), find_cut(model, 3)
    times = tuple(float(t) for t in range(6))
    sampler = SamplerRef(class_="X", steps=6, calls=6, timesteps=times, log_snr=times, step_of_call=tuple(range(6)))
    ref = ModelRef(class_="X", config_sha256="x")
    schedule = schedule_from_refreshes([0, 3], cuts=[near, far], of_segment=["up1", "up3"], model=ref, sampler=sampler)

    def total(cut: Cut) -> float:
        return macs.partial(cut).total

    assert macs.mean(schedule).total == pytest.approx((2 * macs.full.total + 2 * total(near) + 2 * total(far)) / 6)
