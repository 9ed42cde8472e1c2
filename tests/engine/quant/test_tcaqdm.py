"""TCAQ-DM: factors per channel, folding, the adaptive softmax, aligned rounds (quantization spec 5 and 8.2)."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore, TrajectoryWriter, write_index
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.methods.tcaqdm import TcaqDmConfig, tcaqdm
from qdm_cli.engine.models import layer_roles, load_pipeline
from qdm_cli.engine.quant import aligned
from qdm_cli.engine.quant.adaptive_softmax import SoftmaxSettings, power_law_wins, with_adaptive_softmax
from qdm_cli.engine.quant.attention import Scores, products_of, quantize_log2, quantize_probabilities
from qdm_cli.engine.quant.attention_ranges import with_attention
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.channel_scales import FactorSettings, channel_factors, choose_factors, layer_error, weighted_maxima
from qdm_cli.engine.quant.fold_norms import folded_parameters, norms_before
from qdm_cli.engine.quant.modules import build_layer, weight_before_codes
from qdm_cli.engine.quant.state import AttentionDecision, LayerDecision, QuantState, read_state, write_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec
from tests.engine.quant.test_attention import operands, policy, store_of, tables
from tests.engine.quant.test_reconstruction import context, decisions_of, denoiser, same_state, store_at


class FloatWeight(nn.Module):
    """A weight that is not quantized, in the place of codes."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = weight

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weight, torch.ones(len(self.weight))


def settings(**fields) -> FactorSettings:
    rule = RangeRule("mse")
    return FactorSettings(
        **{"alphas": (0.5,), "kinds": ("Conv2d", "Linear"), "samples": 8, "memory": 2**20} | fields,
        weight_rule=rule,
        activation_rule=rule,
    )


@pytest.fixture(scope="module")
def errors():
    """Relative error by (bits_w, bits_a, alpha): 256 SiLU channels, 6 outliers with opposite trends over 20 steps."""
    rng = torch.Generator().manual_seed(0)
    linear = nn.Linear(256, 64)
    inputs = []
    for step in range(20):
        gains = torch.ones(256)
        gains[:3], gains[3:6] = 1 + 9 * step / 19, 10 - 9 * step / 19
        inputs.append((float(step), F.silu(torch.randn(64, 256, generator=rng)) * gains))
    maxima = torch.stack([x.abs().amax(0) for _, x in inputs])
    found = {}
    for bits_w, bits_a in ((4, 8), (4, 4), (8, 8)):
        decision = LayerDecision("l", "Linear", (64, 256), "other", bits_w=bits_w, bits_a=bits_a)
        for alpha in (0.0, 0.25, 0.75, 1.0):
            found[bits_w, bits_a, alpha] = layer_error(linear, decision, channel_factors(maxima, alpha), inputs, settings()) ** 0.5
    return found


@pytest.fixture(scope="module")
def unet():
    return load_pipeline(ModelSpec(id="tiny:sd"), SamplerSpec(steps=2), offline=True).denoiser


class TestFactors:
    def test_steps_with_large_values_count_more(self):
        maxima = torch.tensor([[1.0, 2.0], [9.0, 3.0]])
        assert weighted_maxima(maxima).tolist() == pytest.approx([(2 * 1 + 9 * 9) / 11, (2 * 2 + 9 * 3) / 11])

    def test_they_even_out_the_channels_and_have_the_geometric_mean_one(self):
        maxima = torch.tensor([[4.0, 1.0, 0.0, 16.0]])
        assert channel_factors(maxima, 0.0) is None
        half, whole = channel_factors(maxima, 0.5), channel_factors(maxima, 1.0)
        assert torch.allclose(half.square(), whole) and float(whole.double().log().mean()) == pytest.approx(0, abs=1e-6)
        evened = whole * maxima[0]
        assert float(evened[0]) == pytest.approx(float(evened[3])) and torch.isfinite(whole).all()  # channel 2 is dead

    def test_full_precision_is_unchanged_behind_a_nonlinearity(self):
        torch.manual_seed(0)
        conv, norm, x = nn.Conv2d(12, 8, 3, padding=1), nn.GroupNorm(4, 12), torch.randn(2, 12, 6, 6)
        read = F.silu(norm(x * torch.logspace(-2, 1, 12).reshape(-1, 1, 1)))
        factors = channel_factors(read.detach().abs().amax((0, 2, 3))[None], 1.0)
        decision = LayerDecision("conv", "Conv2d", tuple(conv.weight.shape), "other", bits_w=8, bits_a=None, pre_scale=True)
        scaled = build_layer(
            conv, decision, FloatWeight(weight_before_codes(conv.weight, factors)), conv.bias, None, StepContext(), factors
        )
        assert (scaled(read) - conv(read)).abs().max() < 1e-5

    def test_strength_against_bits(self, errors):
        assert errors[4, 8, 1.0] > errors[4, 8, 0.25]
        assert errors[4, 4, 0.0] >= 1.5 * errors[4, 4, 0.75]
        assert errors[8, 8, 0.0] >= 1.5 * errors[8, 8, 0.75]

    @pytest.mark.parametrize("memory", [0, 2**30], ids=["one layer at a time", "all at once"])
    def test_the_best_of_the_grid_is_taken(self, tmp_path, memory):
        model = denoiser()
        with torch.no_grad():
            model.inner.weight[:2] *= 40  # two channels of the blocks' input
        store = store_at(tmp_path / "store")
        calls = [store.arguments(record) for record in store.records]
        chosen = {d.name: d for d in decisions_of(model, bits_a=4)}
        factors, figures = choose_factors(model, chosen, settings(alphas=(0.0, 0.5, 1.0), memory=memory), calls)
        assert figures["blocks.1.first"]["alpha"] > 0 and figures["blocks.1.first"]["error"] < figures["blocks.1.first"]["error_without"]
        assert set(factors) == {name for name, figure in figures.items() if figure["alpha"] > 0}
        assert set(figures) == set(chosen)


class TestFolding:
    def run(self, unet):
        rng = torch.Generator().manual_seed(0)
        x, text = torch.randn(1, 4, 8, 8, generator=rng), torch.randn(1, 5, unet.config.cross_attention_dim, generator=rng)
        with torch.no_grad():
            return unet(x, 500, encoder_hidden_states=text, return_dict=False)[0]

    def test_projections_behind_a_norm_and_nothing_behind_a_nonlinearity(self, unet):
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        found = norms_before(unet, layer_roles(unet), lambda: self.run(unet))
        assert "down_blocks.0.attentions.0.proj_in" in found
        assert not any("resnets" in name for name in found)
        # three layers read the norm before self-attention, so none of them may change it
        assert not any(name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")) for name in found)
        assert all(torch.equal(before[name], value) for name, value in unet.state_dict().items())

    def test_a_folded_layer_gives_the_same_output(self, unet, tmp_path):
        name = "down_blocks.0.attentions.0.proj_in"
        norm = norms_before(unet, [name], lambda: self.run(unet))[name]
        factors = torch.rand(unet.get_submodule(name).weight.shape[1], generator=torch.Generator().manual_seed(1)) + 0.5
        shape = tuple(unet.get_submodule(name).weight.shape)
        decision = LayerDecision(name, "Conv2d" if len(shape) == 4 else "Linear", shape, "other", bits_w=8)
        codes = code_layer(unet.get_submodule(name), decision, RangeRule("max"), None, factors)
        floats = folded_parameters(unet.get_submodule(norm), norm, factors)
        state = QuantState({name: codes}, floats=floats)
        write_state(tmp_path, state)
        folded, want = copy.deepcopy(unet), self.run(unet)
        apply_state_(folded, read_state(tmp_path))
        assert codes.own_factors is None and codes.pre_scale is not None
        assert (self.run(folded) - want).norm() < 0.02 * want.norm()  # the error of 8-bit weights


class TestSoftmax:
    def maps(self, tokens: int, std: float) -> torch.Tensor:
        return (torch.randn(8, tokens, tokens, generator=torch.Generator().manual_seed(0)) * std).softmax(-1)

    def error(self, p: torch.Tensor, rounded: torch.Tensor) -> float:
        v = torch.randn(p.shape[-1], 16, generator=torch.Generator().manual_seed(1))
        return float(((rounded - p) @ v).norm() / (p @ v).norm())

    def test_codes_are_powers_of_two_and_zero_stays_zero(self):
        p = torch.tensor([[0.0, 1e-9, 0.03, 0.2, 0.8]], requires_grad=True)
        rounded = quantize_log2(p, torch.tensor(0.8), 4, renormalise=False)
        assert rounded[0, :2].tolist() == [0.0, 0.0]
        exponents = torch.log2(rounded[0, 2:] / 0.8)
        assert torch.allclose(exponents, exponents.round(), atol=1e-5) and float(rounded[0, 4].detach()) == pytest.approx(0.8)
        rounded.sum().backward()
        assert p.grad.tolist() == [[1.0] * 5]
        rows = quantize_log2(self.maps(64, 2), torch.tensor(0.9), 4, renormalise=True)
        assert torch.allclose(rows.sum(-1), torch.ones(8, 64), atol=1e-5)

    def test_powers_pay_at_four_bits_on_long_diffuse_rows_alone(self):
        p = self.maps(1024, 1.0)
        uniform = {bits: quantize_probabilities(p, p.amax() / (2**bits - 1), bits) for bits in (4, 8)}
        powers = {bits: quantize_log2(p, p.amax(), bits, renormalise=True) for bits in (4, 8)}
        assert self.error(p, powers[4]) < 0.6 * self.error(p, uniform[4])
        assert self.error(p, powers[8]) > self.error(p, uniform[8])

    def test_the_likelihood_ratio_knows_its_laws(self):
        u = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        assert power_law_wins(1e-2**u, 1e-2)  # density 1/x on [0.01, 1]
        exponential = -torch.log1p(-u * (1 - torch.exp(torch.tensor(-8.0)))) / 8
        assert not power_law_wins(exponential, 1e-2)
        assert not power_law_wins(torch.zeros(5), 1e-2)

    @pytest.mark.parametrize("by", ["error", "likelihood"])
    @pytest.mark.parametrize("aware", [False, True])
    def test_tables_of_a_denoiser(self, tiny_unet, tmp_path, by, aware):
        store = store_of(tmp_path)
        state = QuantState({}, step_keys=torch.tensor([0.0, 400.0, 800.0], dtype=torch.float64) if aware else torch.zeros(1))
        state = with_attention(state, tiny_unet, policy(aware, softmax_bits=4), store, 4)
        new = with_adaptive_softmax(state, tiny_unet, store, SoftmaxSettings(by, 2, True, 4), SimpleNamespace(events=Quiet()))
        assert new.step_keys.tolist() == [0.0, 400.0, 800.0]
        for name, own in new.attention.items():
            assert own.softmax_log2.dtype == torch.int8 and len(own.softmax_log2) == len(own.scales) == 3
            assert own.softmax_log2[0] == own.softmax_log2[1]  # one group
            if by == "error":
                assert measured(tiny_unet, new, store) <= measured(tiny_unet, state, store) * 1.001, name
        write_state(tmp_path, new)
        again = read_state(tmp_path).attention
        assert all(torch.equal(again[name].softmax_log2, own.softmax_log2) for name, own in new.attention.items())

    def test_rows_choose_their_kind(self):
        values = operands()
        state = replace(
            tables(values, softmax_bits=4, rows=2),
            decision=AttentionDecision("attn", 8, 4, timestep_aware=True, adaptive=True, renormalise=True),
            softmax_scale=torch.tensor([0.9, 1 / 15]),
            softmax_log2=torch.tensor([1, 0], dtype=torch.int8),
        )
        products = products_of(state)
        products.step = StepContext(torch.tensor([100.0, 900.0]))
        q, k, v = (products._rounded(x, operand) for operand, x in enumerate(values))
        p = Scores(8**-0.5, None).probabilities(q, k)
        want = {
            100.0: quantize_log2(p, torch.tensor(0.9), 4, renormalise=True) @ v,
            900.0: quantize_probabilities(p, torch.tensor(1 / 15), 4) @ v,
        }
        for timestep, expected in want.items():
            products.step.set_timestep(timestep)
            assert torch.equal(products.attend(*values, Scores(8**-0.5, None)), expected)


class Quiet:
    def log(self, message: str) -> None: ...


def measured(unet: nn.Module, state: QuantState, store: TrajectoryStore) -> float:
    return aligned.prediction_error(unet, state, aligned.stored_calls(store))


def own_toy_trajectories(model: nn.Module, folder: Path, *, first: int, samples: int) -> TrajectoryStore:
    """x_t that depend on the model, as those of a sampler do."""
    if not (folder / "index.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        writer = TrajectoryWriter(folder, 0, 2**20)
        x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(first))
        for t in (900.0, 700.0, 500.0, 300.0, 100.0):
            writer.add({"sample": x, "timestep": torch.tensor(t)})
            with torch.no_grad():
                x = x - 0.1 * model(x, t, return_dict=False)[0]
        writer.close()
        write_index(folder, {"model": "toy"})
    return TrajectoryStore(folder)


def config(**fields) -> TcaqDmConfig:
    base = {
        "calibration_steps": 5,
        "batch_size": 16,
        "rounding": {"iterations": 20, "lr": 3e-2},
        "channels": {"layers": "all", "alpha": 0.5},
        "aligned": {"rounds": 1, "samples": 12, "held_out": 6},
    }
    return TcaqDmConfig.model_validate(base | fields)


def calibrated(folder: Path, cfg: TcaqDmConfig, sample=own_toy_trajectories, **policy):
    folder.mkdir(exist_ok=True)
    model, ctx = denoiser(), context(folder / "work")
    ctx.recipe.quantize.attention = None
    store = TrajectoryStore(folder / "store") if (folder / "store").exists() else store_at(folder / "store")
    decisions = decisions_of(model, **({"bits_a": 4} | policy))
    return model, tcaqdm(model, cfg, ctx, decisions=decisions, store=store, sample=sample), ctx


class TestMethod:
    def test_units_improve_and_the_round_is_reported(self, tmp_path):
        model, _, ctx = calibrated(tmp_path, config(rounding={"iterations": 100, "lr": 3e-2}))
        report = json.loads((ctx.payload / "reconstruction.json").read_text())
        assert [row["unit"] for row in report["joint"]] == ["time", "inner", "blocks.1", "blocks.0", "out"]
        assert all(row["error"] <= row["error_start"] for row in report["joint"] + report["round-0"])
        assert min(row["error"] / row["error_start"] for row in report["joint"]) < 0.9
        (round_,) = report["rounds"]
        assert round_["kept"] == (round_["held_out"] < round_["held_out_before"])
        assert all(torch.equal(model.state_dict()[key], value) for key, value in denoiser().state_dict().items())

    def test_a_round_that_makes_it_worse_is_rejected(self, tmp_path, monkeypatch):
        _, before, _ = calibrated(tmp_path / "a", config(aligned={"rounds": 0}))
        errors = iter([0.1, 0.2])
        monkeypatch.setattr(aligned, "prediction_error", lambda *_: next(errors))
        _, state, ctx = calibrated(tmp_path / "b", config())
        assert json.loads((ctx.payload / "reconstruction.json").read_text())["rounds"][0]["kept"] is False
        assert same_state(before, state)

    def test_the_same_again_after_a_cut(self, tmp_path):
        cfg = config(bias_lr=1e-3)
        model, whole, ctx = calibrated(tmp_path, cfg)
        for path in [*ctx.resume.glob("joint-000[3-9].safetensors"), *ctx.resume.glob("round-*.safetensors")]:
            path.unlink()
        assert len(list(ctx.resume.glob("joint-*.safetensors"))) == 3
        again = calibrated(tmp_path, cfg)[1]
        assert same_state(whole, again)
        assert all(torch.equal(layer.bias, again.layers[name].bias) for name, layer in whole.layers.items())
        assert not torch.equal(whole.layers["blocks.0.second"].bias, model.blocks[0].second.bias)

    def test_a_model_that_is_off_names_the_first_bad_unit(self, tmp_path):
        with pytest.raises(GateFailed, match=r"off by .* The first unit that is off is \w+"):
            calibrated(tmp_path, config(largest_error=1e-6, aligned={"rounds": 0}), bits_w=2, bits_a=2)

    def test_one_scale_per_step_where_the_policy_asks_for_it(self, tmp_path):
        _, state, _ = calibrated(tmp_path, config(aligned={"rounds": 0}), timestep_aware=True)
        assert state.step_keys.tolist() == [100.0, 300.0, 500.0, 700.0, 900.0]
        assert all(layer.act_scale.shape == (5,) for layer in state.layers.values())
