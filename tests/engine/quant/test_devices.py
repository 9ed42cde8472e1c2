"""Calibration methods on another device than the CPU: everything meets where the model lies, and the result is that of the CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qdm_cli.engine.methods.qdiffusion import qdiffusion
from qdm_cli.engine.methods.tcaqdm import tcaqdm
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant.adaptive_softmax import SoftmaxSettings, with_adaptive_softmax
from qdm_cli.engine.quant.attention_ranges import with_attention
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.fold_norms import folded_parameters, norms_before
from qdm_cli.engine.quant.state import LayerDecision, QuantState
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec
from tests.elsewhere import elsewhere
from tests.engine.quant.test_attention import policy, store_of
from tests.engine.quant.test_reconstruction import context, decisions_of, denoiser, same_state, settings, store_at
from tests.engine.quant.test_tcaqdm import Quiet, config, own_toy_trajectories


def own_trajectories(model, folder, *, first: int, samples: int):
    """Trajectories of a model wherever it lies."""
    device = next(model.parameters()).device

    def call(x: torch.Tensor, t: float, **kwargs) -> tuple[torch.Tensor]:
        return (model(x.to(device), t, **kwargs)[0].cpu(),)

    return own_toy_trajectories(call, folder, first=first, samples=samples)


def calibrated(folder, method, cfg, device: torch.device | str, **policy):
    model = denoiser().to(device)
    ctx = context(folder / f"work-{device}")
    ctx.recipe.quantize.attention = None
    store = store_at(folder / f"store-{device}")
    return method(model, cfg, ctx, decisions=decisions_of(model, **policy), store=store, sample=own_trajectories)


@pytest.mark.parametrize(
    ("fields", "aware"),
    [
        ({"bias_lr": 1e-3, "channels": {"layers": "all", "grid": [0.0, 0.5]}, "largest_error": 10.0}, False),
        ({"channels": {"layers": "all", "alpha": 0.5}, "aligned": {"rounds": 2, "samples": 4, "held_out": 2, "keep": 1.0}}, True),
    ],
    ids=["grid", "rounds-per-step"],
)
def test_tcaqdm(tmp_path, monkeypatch, fields, aware) -> None:
    policy = {"bits_a": 4, "timestep_aware": aware}
    want = calibrated(tmp_path, tcaqdm, config(**fields), "cpu", **policy)
    with elsewhere(monkeypatch) as device:
        got = calibrated(tmp_path, tcaqdm, config(**fields), device, **policy)
    assert same_state(want, got)


def test_a_folded_norm(tmp_path, monkeypatch) -> None:
    name, norm = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.norm"
    unet = load_pipeline(ModelSpec(id="tiny:sd"), SamplerSpec(steps=2), offline=True).denoiser
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 5, unet.config.cross_attention_dim)
    factors = torch.linspace(0.5, 2, unet.get_submodule(name).weight.shape[1])

    def run(model) -> torch.Tensor:
        with torch.no_grad():
            device = next(model.parameters()).device
            return model(x.to(device), 500, encoder_hidden_states=text.to(device), return_dict=False)[0]

    want = run(unet)
    with elsewhere(monkeypatch) as device:
        unet.to(device)
        assert norms_before(unet, [name], lambda: run(unet)) == {name: norm}
        decision = LayerDecision(name, "Conv2d", tuple(unet.get_submodule(name).weight.shape), "other", bits_w=8, folded_into=norm)
        codes = code_layer(unet.get_submodule(name), decision, RangeRule("mse"), None, factors).cpu()
        floats = folded_parameters(unet.get_submodule(norm), norm, factors)
        apply_state_(unet, QuantState({name: codes}, floats=floats))
        got = run(unet)
        assert got.device == device
        assert (got.cpu() - want).norm() < 0.02 * want.norm()


@pytest.mark.parametrize("init", ["mse", "running"])
def test_qdiffusion(tmp_path, monkeypatch, init) -> None:
    cfg = settings(activations={"iterations": 10, "init": init})
    want = calibrated(tmp_path, qdiffusion, cfg, "cpu")
    with elsewhere(monkeypatch) as device:
        got = calibrated(tmp_path, qdiffusion, cfg, device)
    assert same_state(want, got)


@pytest.mark.parametrize("by", ["error", "likelihood"])
def test_adaptive_softmax(tiny_unet, tmp_path, monkeypatch, by) -> None:
    store, ctx = store_of(tmp_path), SimpleNamespace(events=Quiet())
    start = QuantState({}, step_keys=torch.tensor([0.0, 400.0, 800.0], dtype=torch.float64))

    def chosen() -> QuantState:
        state = with_attention(start, tiny_unet, policy(True, softmax_bits=4), store, 4)
        return with_adaptive_softmax(state, tiny_unet, store, SoftmaxSettings(by, 2, True, 4), ctx)

    want = chosen()
    with elsewhere(monkeypatch) as device:
        tiny_unet.to(device)
        got = chosen()
    assert want.attention and all(torch.equal(own.softmax_log2, got.attention[name].softmax_log2) for name, own in want.attention.items())
    assert all(torch.equal(own.scales, got.attention[name].scales) for name, own in want.attention.items())
