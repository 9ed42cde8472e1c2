"""Quantized attention products: arithmetic, reach over diffusers' processors, tables through state and folder."""

import copy
import json
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore, TrajectoryWriter, write_index
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant import attention as quantized
from qdm_cli.engine.quant.attention import (
    AttentionProducts,
    Scores,
    attach_products_,
    attention_modules,
    products_of,
    quantize_probabilities,
    replaced_attention,
)
from qdm_cli.engine.quant.attention_ranges import with_attention
from qdm_cli.engine.quant.config import AttentionPolicy
from qdm_cli.engine.quant.grid import IntGrid, choose_qparams
from qdm_cli.engine.quant.qalora import with_rows
from qdm_cli.engine.quant.state import AttentionDecision, AttentionState, read_state, write_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec
from qdm_cli.engine.runtime.modules import pack_denoiser_


def operands(tokens: int = 6) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, tokens, 8, generator=rng) for _ in range(3)]


def tables(values: list[torch.Tensor], bits: int = 8, softmax_bits: int | None = 8, rows: int = 1) -> AttentionState:
    params = [choose_qparams(x, IntGrid(bits)) for x in values]
    scales = torch.stack([p.scale for p in params]).expand(rows, 3).clone()
    zeros = torch.stack([p.zero_point for p in params]).expand(rows, 3).to(torch.int8)
    softmax = None if softmax_bits is None else torch.full((rows,), 1 / (2**softmax_bits - 1))
    return AttentionState(AttentionDecision("attn", bits, softmax_bits, rows > 1), scales, zeros, softmax)


def oracle(values: list[torch.Tensor], state: AttentionState, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The formula of the module in float64, from explicit integer codes."""
    half = 2 ** (state.decision.bits - 1)
    q, k, v = (
        (torch.round(x * (1 / scale)).double() + zero.double()).clamp(-half, half - 1).sub(zero.double()) * scale.double()
        for x, scale, zero in zip(values, state.scales[0], state.zero_points[0], strict=True)
    )
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    p = (scores if bias is None else scores + bias.double()).softmax(-1)
    if state.softmax_scale is not None:
        step = state.softmax_scale[0].double()
        p = torch.round(p / step).clamp(0, 2**state.decision.softmax_bits - 1) * step
    return p @ v


@pytest.mark.parametrize("softmax_bits", [None, 4, 8, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_products_are_those_of_the_codes(softmax_bits, masked):
    values = operands()
    state = tables(values, 8, softmax_bits)
    bias = torch.randn(2, 1, 6, 6, generator=torch.Generator().manual_seed(1)) if masked else None
    want = oracle(values, state, bias)
    got = products_of(state).attend(*values, Scores(8**-0.5, bias))
    # of 65,536 codes, a probability within float32 rounding of a tie takes the neighbouring one
    assert (got.double() - want).abs().max() < (4 / 2**16 if softmax_bits == 16 else 2e-6)


@pytest.mark.parametrize("bias", [None, (2, 1, 50, 50), (2, 1, 1, 50), (50,)], ids=str)
def test_blocks_of_queries_give_what_all_of_them_give(bias, monkeypatch):
    values = operands(50)
    products = products_of(tables(values))
    mask = None if bias is None else torch.randn(bias, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = products.attend(*values, Scores(8**-0.5, mask))
        monkeypatch.setitem(quantized.BLOCK_BYTES, "cpu", 2 * 3 * 50 * 4 * 20)
        assert quantized._blocks(*values[:2]) == [slice(0, 16), slice(16, 32), slice(32, 50)]
        assert torch.equal(products.attend(*values, Scores(8**-0.5, mask)), whole)
    assert products.calls == 2
    assert quantized._blocks(*values[:2]) == [slice(None)]  # gradients would keep all of them


@pytest.mark.parametrize("queries", [17, 31, 32, 33, 49, 65, 257])
@torch.no_grad()
def test_a_row_left_over_does_not_change_the_bits(queries, monkeypatch):
    values = operands(queries)
    products = products_of(tables(values, softmax_bits=None))
    whole = products.attend(*values, Scores(8**-0.5, None))
    monkeypatch.setitem(quantized.BLOCK_BYTES, "cpu", 1)
    blocks = quantized._blocks(*values[:2])
    assert [block.stop - block.start for block in blocks[:-1]] == [16] * (queries // 16 - 1)
    assert torch.equal(products.attend(*values, Scores(8**-0.5, None)), whole)


def test_more_bits_are_closer_to_the_float_attention():
    values = operands(64)
    want = F.scaled_dot_product_attention(*values)
    errors = {}
    for bits, softmax_bits in ((4, 8), (8, 4), (8, 8), (8, 16)):
        got = products_of(tables(values, bits, softmax_bits)).attend(*values, Scores(8**-0.5, None))
        errors[bits, softmax_bits] = float((got - want).norm() / want.norm())
    assert errors[8, 16] < errors[8, 8] < errors[8, 4] and errors[8, 8] < errors[4, 8]
    assert errors[8, 16] < 0.02


def test_probabilities_are_unsigned_and_clipped():
    p = torch.tensor([0.0, 0.26, 0.5, 1.0], requires_grad=True)
    rounded = quantize_probabilities(p, torch.tensor(0.25), 2)
    assert rounded.tolist() == [0.0, 0.25, 0.5, 0.75]
    rounded.sum().backward()
    assert p.grad.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_rows_follow_the_step_and_samples_their_own():
    values = operands()
    state = tables(values, rows=2)
    state.scales[1] *= 3
    products = products_of(state)
    products.step = StepContext(torch.tensor([100.0, 900.0]))
    one = {}
    for timestep in (100.0, 900.0):
        products.step.set_timestep(timestep)
        one[timestep] = products.attend(*values, Scores(8**-0.5, None))
    assert not torch.equal(one[100.0], one[900.0])
    products.step.set_timestep(torch.tensor([900.0, 100.0]))
    mixed = products.attend(*values, Scores(8**-0.5, None))
    assert torch.equal(mixed, torch.stack([one[900.0][0], one[100.0][1]]))


@pytest.fixture
def unet(tiny_unet):
    return tiny_unet


def store_of(folder, channels: int = 3, size: int = 16, timesteps=(800.0, 400.0, 0.0)) -> TrajectoryStore:
    rng = torch.Generator().manual_seed(4)
    writer = TrajectoryWriter(folder, 0, 2**20)
    for timestep in timesteps:
        writer.add({"sample": torch.randn(4, channels, size, size, generator=rng), "timestep": torch.tensor(timestep)})
    writer.close()
    write_index(folder, {"model": "tiny"})
    return TrajectoryStore(folder)


def policy(aware: bool = False, **fields) -> SimpleNamespace:
    return SimpleNamespace(attention=AttentionPolicy(**fields), activations=SimpleNamespace(timestep_aware=aware))


class TestInDenoisers:
    @pytest.mark.parametrize("family", ["ddpm", "sd", "sdxl", "dit", "pixart", "sd3", "flux"])
    def test_every_attention_of_every_family_is_reached(self, family):
        from qdm_cli.engine.diffusion.sampling import step_timesteps

        loaded = load_pipeline(ModelSpec(id=f"tiny:{family}"), SamplerSpec(steps=1), offline=True)
        names, reached = attention_modules(loaded.denoiser), set()
        assert names

        def seeing(name):
            return lambda q, k, v, scores: (reached.add(name), scores.probabilities(q, k) @ v.float())[1].to(q.dtype)

        with ExitStack() as stack:
            for name in names:
                stack.enter_context(replaced_attention(loaded.denoiser.get_submodule(name), seeing(name)))
            step_timesteps(loaded, SamplerSpec(steps=1))
        assert reached == set(names)

    def test_sixteen_bits_change_little_and_two_much(self, unet, make_state, tmp_path):
        store = store_of(tmp_path)
        state = make_state(unet, skip="", bits_a=None)  # nothing but attention
        state = type(state)({}, (), state.step_keys)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        want, errors = unet(x, 400).sample, {}
        for bits in (2, 8):
            copied = copy.deepcopy(unet)
            apply_state_(copied, with_attention(state, unet, policy(bits=bits, softmax_bits=16), store, 4))
            errors[bits] = float((copied(x, 400).sample - want).norm() / want.norm())
        assert 0 < errors[8] < 0.01 and errors[2] > 5 * errors[8]

    def test_a_forward_that_is_cut_short_leaves_nothing_behind(self, unet):
        module = unet.get_submodule(attention_modules(unet)[0])
        attach_products_(module, AttentionProducts(AttentionDecision("attn", 8, 8), 1))
        module.to_q.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            module(torch.zeros(1, 32, 4, 4))
        assert torch.overrides._get_current_function_mode() is None

    def test_a_processor_without_the_call_is_refused(self, unet, tmp_path, make_state):
        from diffusers.models.attention_processor import AttnProcessor

        name = attention_modules(unet)[0]
        unet.get_submodule(name).set_processor(AttnProcessor())
        with pytest.raises(InputError, match=f"{name} never calls"):
            with_attention(make_state(unet), unet, policy(), store_of(tmp_path), 4)
        module = unet.get_submodule(name)
        attach_products_(module, AttentionProducts(AttentionDecision(name, 8, 8), 1))
        with pytest.raises(RuntimeError, match="AttnProcessor does not call"):
            module(torch.zeros(1, 32, 4, 4))

    def test_a_model_without_attention_is_refused(self, make_state, tmp_path):
        from torch import nn

        with pytest.raises(InputError, match="has no attention"):
            with_attention(make_state(nn.Sequential(nn.Linear(2, 2))), nn.Sequential(nn.Linear(2, 2)), policy(), store_of(tmp_path), 4)


class TestTables:
    @pytest.fixture
    def state(self, unet, make_state, tmp_path):
        (tmp_path / "store").mkdir()
        keys = [800.0, 400.0, 0.0]
        return with_attention(make_state(unet, keys=keys), unet, policy(aware=True), store_of(tmp_path / "store"), 4)

    def test_one_row_per_step(self, state):
        attention = next(iter(state.attention.values()))
        assert attention.scales.shape == (3, 3) and attention.zero_points.dtype == torch.int8
        assert attention.softmax_scale.shape == (3,) and 0 < attention.softmax_scale.max() <= 1 / 255 + 1e-6

    def test_they_survive_the_file(self, state, tmp_path):
        write_state(tmp_path, state)
        again = read_state(tmp_path)
        assert set(again.attention) == set(state.attention)
        for name, attention in state.attention.items():
            assert again.attention[name].decision == attention.decision
            for key in ("scales", "zero_points", "softmax_scale"):
                assert torch.equal(getattr(again.attention[name], key), getattr(attention, key))

    def test_they_move_to_other_rows(self, state):
        moved = with_rows(state, [0.0, 390.0])
        name = next(iter(state.attention))
        # rows of `state` are those of its keys 800, 400, 0
        assert torch.equal(moved.attention[name].scales, state.attention[name].scales[[2, 1]])

    def test_packed_equals_simulated_and_a_copy_has_its_own_tables(self, state, unet):
        simulation, packed = copy.deepcopy(unet), copy.deepcopy(unet)
        apply_state_(simulation, state)
        pack_denoiser_(packed, state)
        x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
        before = simulation(x, 400).sample
        assert torch.equal(packed(x, 400).sample, before)
        twin = copy.deepcopy(simulation)
        name = next(iter(state.attention))
        twin.get_submodule(name).products.scales.mul_(20)
        assert not torch.equal(twin(x, 400).sample, before)
        assert torch.equal(simulation(x, 400).sample, before)


def test_an_export_carries_them(tmp_path, make_state):
    from tests.engine.stages.test_export import Bench

    bench = Bench(tmp_path, make_state)
    (tmp_path / "store").mkdir()
    channels, size = bench.denoiser.config.in_channels, bench.denoiser.config.sample_size
    state = with_attention(bench.state, bench.denoiser, policy(aware=True), store_of(tmp_path / "store", channels, size), 4)
    first, own = next(iter(state.attention.items()))
    log2 = torch.tensor([1, 0, 1, 0, 1], dtype=torch.int8)
    state.attention[first] = replace(own, decision=replace(own.decision, adaptive=True, renormalise=True), softmax_log2=log2)
    write_state(bench.source.folder, state)
    result = bench.export(component_only=True)
    assert result.metrics["selfcheck_rel_rms"] <= 1e-5
    assert any("simulation" in warning for warning in bench.ctx.warnings)
    config = json.loads((bench.out / "config.json").read_text())["quantization_config"]
    assert set(config["attention"]) == set(state.attention)
    plain = {"bits": 8, "softmax_bits": 8, "timestep_aware": True}
    assert config["attention"].pop(first) == plain | {"adaptive": True, "renormalise": True}
    assert all(fields == plain for fields in config["attention"].values())
