"""A quantized state made from a float denoiser without calibration, for tests of what comes after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def _layer_state(name: str, module: Any, rows: int, rng: Any, **policy: Any) -> Any:
    """Codes of the module's own weight, rounded to nearest; random activation tables."""
    import torch

    from qdm_cli.engine.quant.grid import IntGrid, broadcast, choose_qparams, quantize
    from qdm_cli.engine.quant.modules import weight_granularity
    from qdm_cli.engine.quant.state import LayerDecision, LayerState

    fields = {"bits_w": 4, "bits_a": 8, "symmetric": False, "act_mode": "static", "act_symmetric": False, "timestep_aware": True} | policy
    group = fields.pop("group_size", None)
    weight = module.weight.detach().float()
    decision = LayerDecision(
        name,
        "Linear" if weight.ndim == 2 else "Conv2d",
        tuple(weight.shape),
        "other",
        granularity="group" if group else "channel",
        group_size=group,
        rule="test",
        **fields,
    )
    granularity = weight_granularity(decision)
    params = choose_qparams(weight, IntGrid(decision.bits_w), granularity, symmetric=decision.symmetric)
    codes = quantize(weight, params, IntGrid(decision.bits_w), granularity)
    assert broadcast(params.scale, weight.shape, granularity).ndim == weight.ndim
    scale = zero = None
    if decision.bits_a is not None and decision.act_mode == "static":
        count = (rows if decision.timestep_aware else 1, *([2] if decision.split else []))
        scale = torch.rand(count, generator=rng) * 0.02 + 4.0 / 2**decision.bits_a
        half = 2 ** (decision.bits_a - 1)
        zero = torch.randint(-half // 2, half // 2, count, generator=rng).to(torch.int8)
        zero = torch.zeros_like(zero) if decision.act_symmetric else zero
    bias = None if module.bias is None else module.bias.detach().float().clone()
    factors = None
    if decision.pre_scale:
        factors = torch.rand(weight.shape[1] * getattr(module, "groups", 1), generator=rng) + 0.5
    return LayerState(decision, codes, params.scale, params.zero_point.to(torch.int8), bias, scale, zero, factors)


@pytest.fixture
def make_layer_state() -> Callable[..., Any]:
    """`make_layer_state(module, rows=1, seed=0, name="layer", **policy)` -> LayerState; policy: fields of LayerDecision."""
    import torch

    def make(module: Any, rows: int = 1, seed: int = 0, name: str = "layer", **policy: Any) -> Any:
        return _layer_state(name, module, rows, torch.Generator().manual_seed(seed), **policy)

    return make


@pytest.fixture
def make_state() -> Callable[..., Any]:
    """`make_state(denoiser, keys=[...], row_mode=..., skip=text, split=False, **policy)` -> QuantState.

    Layers whose name holds `skip` stay float; `split=True` splits the shortcuts that read a concatenation.
    """
    import torch

    from qdm_cli.engine.models.concats import shortcut_splits
    from qdm_cli.engine.quant.state import LayerDecision, QuantState

    def make(
        denoiser: Any,
        keys: list[float] | None = None,
        row_mode: str = "nearest",
        skip: str = "shortcut",
        split: bool = False,
        **policy: Any,
    ) -> Any:
        splits = shortcut_splits(denoiser) if split else {}
        keys = keys or [800.0, 600.0, 400.0, 200.0, 0.0]
        rng, layers, skipped = torch.Generator().manual_seed(0), {}, []
        for name, module in denoiser.named_modules():
            if not isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
                continue
            if skip in name:
                kind = "Linear" if module.weight.ndim == 2 else "Conv2d"
                skipped.append(LayerDecision(name, kind, tuple(module.weight.shape), "other", skipped_why="kept by the test"))
            else:
                edge = {"bits_w": 8, "timestep_aware": False} if name in ("conv_in", "conv_out") else {}
                half = {"split": splits[name], "pre_scale": False} if name in splits else {}
                layers[name] = _layer_state(name, module, len(keys), rng, **policy | edge | half)
        return QuantState(layers, tuple(skipped), torch.tensor(keys, dtype=torch.float64), row_mode)

    return make


@pytest.fixture
def tiny_unet() -> Any:
    """A UNet2DModel of 100,000 parameters with attention, seeded; weights are fp16 numbers held in float32, like those of real models."""
    import torch
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        unet = UNet2DModel(
            sample_size=16,
            in_channels=3,
            out_channels=3,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            attention_head_dim=8,
        )
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.copy_(parameter.half().float())
    return unet.eval().requires_grad_(False)
