"""What is computed once is never stale: keys and values of a prompt, and the common product of queries, keys and values."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.runtime import plain
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_state
from qdm_cli.engine.runtime.reuse import share_inputs_
from qdm_cli.engine.runtime.tune import in_mode
from qdm_kernels.linear_w8a8 import cpu as linear_cpu
from qdm_kernels.linear_w8a8 import op as linear_op


class Heads(nn.Module):
    """Query, key and value layers, named as diffusers names them."""

    def __init__(self, make_layer_state, *, cross: bool, scales: tuple[int, int, int] = (0, 0, 0), rows: int = 1, **policy) -> None:
        super().__init__()
        self.is_cross_attention = cross
        for name, seed in zip(("to_q", "to_k", "to_v"), scales, strict=True):
            linear = nn.Linear(72, 40)
            setattr(self, name, packed_from_state(make_layer_state(linear, rows, seed=seed, **policy), linear, rows))

    def forward(self, x: Tensor, other: Tensor | None = None) -> list[Tensor]:
        return [self.to_q(x), *(layer(x if other is None else other) for layer in (self.to_k, self.to_v))]


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Outputs of every integer product that runs."""
    seen: list[int] = []
    real, direct = linear_op.linear, linear_cpu.from_floats

    def count(codes, scale, zero_point, prepared, **options):
        seen.append(prepared.out_features)
        return real(codes, scale, zero_point, prepared, **options)

    def count_direct(x, source, scale, bias, state, residual=None):
        seen.append(state.packed.outputs)
        return direct(x, source, scale, bias, state, residual)

    monkeypatch.setattr(linear_op, "linear", count)
    monkeypatch.setattr(linear_cpu, "from_floats", count_direct)
    return seen


def tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", [{}, {"act_mode": "dynamic", "act_symmetric": True}, {"bits_w": 8, "symmetric": True}])
def test_queries_keys_and_values_are_one_product(policy: dict, make_layer_state, products: list[int]) -> None:
    heads = Heads(make_layer_state, cross=False, **policy)
    x = tensor(2, 9, 72)
    apart = heads(x)
    products.clear()
    assert share_inputs_(heads) == 3
    assert all(torch.equal(a, b) for a, b in zip(heads(x), apart, strict=True))
    assert products == [120]


def test_layers_that_round_differently_stay_apart(make_layer_state) -> None:
    assert share_inputs_(Heads(make_layer_state, cross=False, scales=(0, 0, 1))) == 0
    assert share_inputs_(Heads(make_layer_state, cross=False, group_size=8)) == 0


def test_a_common_product_serves_its_own_input_only(make_layer_state, products: list[int]) -> None:
    heads = Heads(make_layer_state, cross=False)
    x, other = tensor(9, 72), tensor(9, 72, seed=1)
    want_k, want_v = heads.to_k(other), heads.to_v(other)
    share_inputs_(heads)
    got = heads(x, other)
    assert torch.equal(got[1], want_k)
    assert torch.equal(got[2], want_v)
    heads.to_q(x)
    changed = x.mul_(0.5)
    assert torch.equal(heads.to_k(changed), heads.to_k(changed.clone()))


def test_keys_of_a_prompt_are_computed_once(make_layer_state, products: list[int]) -> None:
    heads = Heads(make_layer_state, cross=True)
    share_inputs_(heads)
    prompt = tensor(2, 7, 72)
    first = heads(tensor(2, 9, 72, seed=2), prompt)
    again = heads(tensor(2, 9, 72, seed=3), prompt)
    assert products == [40] * 4
    assert all(a is b for a, b in zip(first[1:], again[1:], strict=True))


def changes() -> dict[str, object]:
    def in_place(prompt: Tensor, heads: Heads) -> Tensor:
        prompt[0, 0] += 3
        return prompt

    def through_a_view(prompt: Tensor, heads: Heads) -> Tensor:
        prompt.view(-1).mul_(0.5)
        return prompt

    def another(prompt: Tensor, heads: Heads) -> Tensor:
        return prompt * 0.5

    def weights(prompt: Tensor, heads: Heads) -> Tensor:
        heads.to_k.load_buffer_("weight_scale", heads.to_k.weight_scale * 2)
        return prompt

    def output(prompt: Tensor, heads: Heads) -> Tensor:
        heads.to_k(prompt).zero_()
        return prompt

    def moved(prompt: Tensor, heads: Heads) -> Tensor:
        heads.load_state_dict({name: value + 1 if "bias" in name else value for name, value in heads.state_dict().items()})
        return prompt

    return {change.__name__: change for change in (in_place, through_a_view, another, weights, output, moved)}


@pytest.mark.parametrize("change", changes())
def test_nothing_kept_is_stale(change: str, make_layer_state) -> None:
    heads = Heads(make_layer_state, cross=True)
    share_inputs_(heads)
    prompt = tensor(2, 7, 72)
    heads.to_k(prompt)
    prompt = changes()[change](prompt, heads)
    assert torch.equal(heads.to_k(prompt), heads.to_k(prompt.clone()))


def test_a_freed_prompt_cannot_be_mistaken_for_a_new_one(make_layer_state) -> None:
    heads = Heads(make_layer_state, cross=True)
    share_inputs_(heads)
    for seed in range(20):  # CPython gives a new object the address of the freed one
        prompt = tensor(2, 7, 72, seed=seed)
        assert torch.equal(heads.to_k(prompt), heads.to_k(prompt.clone()))
        del prompt


def test_scales_that_change_with_the_step_are_not_kept(make_layer_state, products: list[int]) -> None:
    heads = Heads(make_layer_state, cross=True, rows=3)
    share_inputs_(heads)
    prompt = tensor(2, 7, 72)
    for layer in (heads.to_k, heads.to_v):
        layer(prompt), layer(prompt)
    assert len(products) == 4


def test_inference_tensors_are_computed_anew(make_layer_state, products: list[int]) -> None:
    heads = Heads(make_layer_state, cross=True)
    share_inputs_(heads)
    with torch.inference_mode():
        prompt = tensor(2, 7, 72)
        heads.to_k(prompt), heads.to_k(prompt)
    assert products == [40, 40]


def test_copies_share_nothing_with_the_original(make_layer_state) -> None:
    heads = Heads(make_layer_state, cross=False)
    share_inputs_(heads)
    x = tensor(9, 72)
    twin = copy.deepcopy(heads)
    assert twin.to_q.reuse is None
    assert all(torch.equal(a, b) for a, b in zip(twin(x), heads(x), strict=True))


@pytest.mark.parametrize("name", ["sd", "dit"])
def test_a_denoiser_gives_the_same_bits_with_fewer_products(name: str, make_state, products: list[int]) -> None:
    plain, shared = tiny_denoiser(name).eval().requires_grad_(False), tiny_denoiser(name).eval().requires_grad_(False)
    state = make_state(plain, timestep_aware=False, skip="proj_out")
    alike = {
        key: replace(layer, act_scale=torch.full((1,), 0.03), act_zero_point=torch.zeros(1, dtype=torch.int8))
        for key, layer in state.layers.items()
    }
    state = replace(state, layers=alike)
    pack_denoiser_(plain, state)
    pack_denoiser_(shared, state)
    for layer in plain.modules():
        layer.reuse = None
    call = inputs_of(name)
    with torch.no_grad():
        want, alone = plain(**call).sample, len(products)
        products.clear()
        got = [shared(**call).sample for _ in range(2)]
    assert all(torch.equal(one, want) for one in got)
    assert len(products) < 2 * alone


def inputs_of(name: str) -> dict[str, Tensor]:
    config = tiny_denoiser(name).config
    sample = tensor(2, config.in_channels, config.sample_size, config.sample_size)
    if name == "dit":
        return {"hidden_states": sample, "timestep": torch.tensor([400, 400]), "class_labels": torch.tensor([1, 2])}
    return {"sample": sample, "timestep": torch.tensor(400), "encoder_hidden_states": tensor(2, 7, config.cross_attention_dim)}


def test_float_layers_keep_a_prompt_too(make_layer_state, monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` leaves small products in floating point; keys and values are computed once all the same, and anew when the prompt changes."""
    heads = Heads(make_layer_state, cross=True)
    share_inputs_(heads)
    prompt = tensor(2, 7, 72)
    calls: list[int] = []
    real = plain.forward
    monkeypatch.setattr(plain, "forward", lambda layer, x: calls.append(1) or real(layer, x))
    with in_mode(heads, "auto"):
        assert heads.to_k.choice(prompt).kernel == "float"
        first = heads.to_k(prompt)
        assert heads.to_k(prompt) is first
        assert len(calls) == 1
        prompt.mul_(2)
        assert not torch.equal(heads.to_k(prompt), first)
        assert len(calls) == 2


@pytest.mark.parametrize("original", [nn.Linear(72, 40), nn.Conv2d(8, 12, 3, padding=1)], ids=["linear", "conv2d"])
def test_what_float_layers_multiply_with_is_kept_and_dropped(original: nn.Module, make_layer_state) -> None:
    layer = packed_from_state(make_layer_state(original, 1), original, 1)
    x = tensor(3, 72) if isinstance(original, nn.Linear) else tensor(2, 8, 6, 6)
    with in_mode(layer, "auto"):
        first = layer(x)
        assert layer._operands
        kept = [held for operands in layer._operands.values() for held in operands if held is not None]
        assert all(any(held is own for held in layer.held_tensors()) for own in kept)
        assert torch.equal(layer(x), first)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(layer(x), first)
        layer.load_buffer_("weight_scale", layer.weight_scale * 2)
        assert not layer._operands
        bias = layer.bias if isinstance(original, nn.Linear) else layer.bias.view(-1, 1, 1)
        torch.testing.assert_close(layer(x) - bias, 2 * (first - bias), rtol=2e-2, atol=2e-2)
    assert not layer._operands
