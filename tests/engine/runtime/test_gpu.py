"""Packed denoisers on a CUDA GPU: equal to the CPU's, captured, compiled, offloaded, and as small as stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn
from torch.utils._pytree import tree_map_only

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.runtime import choice
from qdm_cli.engine.runtime.gpu_blocks import flux_heads, fuse_gpu_blocks_
from qdm_cli.engine.runtime.graphs import Graphs
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_state
from qdm_cli.engine.runtime.packed import PackedLayer

pytestmark = pytest.mark.gpu

KEYS = [800.0, 600.0, 400.0, 200.0, 0.0]
POLICIES = {
    "w8a8": {"bits_w": 8},
    "w4a8": {},
    "symmetric": {"symmetric": True, "act_symmetric": True},
    "weight-only": {"bits_a": None},
    "dynamic": {"act_mode": "dynamic", "act_symmetric": True},
}
CASES = [("sd", "w8a8"), ("flux", "w4a8"), ("dit", "symmetric"), ("ddpm", "w4a8"), ("sd", "weight-only"), ("flux", "dynamic")]
FLUX_ATTENTIONS: list[dict[str, Any]] = [{"added_kv_proj_dim": 3072, "context_pre_only": False}, {"pre_only": True}]


def packed_on(device: str, name: str, make_state, mode: str = "exact", dtype: torch.dtype = torch.float32, **policy) -> nn.Module:
    denoiser = tiny_denoiser(name).eval().requires_grad_(False)
    state = make_state(denoiser, keys=KEYS, **policy)
    denoiser.to(dtype)
    pack_denoiser_(denoiser, state, mode)
    return denoiser.to(device)


def inputs(denoiser: nn.Module, device: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> dict[str, Any]:
    side = getattr(denoiser.config, "sample_size", None) or 8
    torch.manual_seed(1)
    call = example_inputs(denoiser, CallShape(batch, batch, (side, side)), "cpu", dtype)
    call["timestep"] = torch.full((batch,), 390.0)
    return tree_map_only(torch.Tensor, lambda value: value.to(device), call)


def answer(model: Callable[..., Any], call: dict[str, Any]) -> torch.Tensor:
    return model(**call, return_dict=False)[0]


def packed_layers(model: nn.Module) -> dict[str, PackedLayer]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.cpu().double() - want.cpu().double()).norm() / want.cpu().double().norm())


@pytest.mark.parametrize(("name", "policy"), CASES)
@torch.no_grad()
def test_every_layer_gives_the_bits_of_the_cpu_on_the_same_input(name: str, policy: str, make_state) -> None:
    cpu, gpu = (packed_on(device, name, make_state, **POLICIES[policy]) for device in ("cpu", "cuda"))
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer_name, layer in packed_layers(cpu).items():
        layer.register_forward_hook(lambda m, args, y, layer_name=layer_name: seen.__setitem__(layer_name, (args[0], y)))
    want = answer(cpu, inputs(cpu, "cpu"))
    got = answer(gpu, inputs(gpu, "cuda"))
    kernels = []
    for layer_name, layer in packed_layers(gpu).items():
        x, y = seen[layer_name]
        ours = layer(x.cuda()).cpu()
        kernels.append(layer.choice(x.cuda()).kernel)
        if kernels[-1] == "integer":
            assert torch.equal(ours, y), layer_name
        else:
            assert relative(ours, y) < 2e-3, layer_name
    # codes turn where norms, attention and TF32 convolutions round differently; a wrong layer gives more, and was compared above
    assert relative(got, want) < 0.1
    assert ("integer" in kernels) == (policy != "weight-only")


@pytest.mark.parametrize(("name", "mode"), [("sd", "auto"), ("flux", "auto"), ("dit", "exact")])
@torch.no_grad()
def test_one_graph_serves_every_step(name: str, mode: str, make_state) -> None:
    model = packed_on("cuda", name, make_state, mode, torch.bfloat16)
    call = inputs(model, "cuda", torch.bfloat16)
    wanted = {}
    for timestep in (790.0, 210.0):
        call["timestep"].fill_(timestep)
        wanted[timestep] = answer(model, call).clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        answer(model, call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = answer(model, call)
    for timestep in (790.0, 210.0, 790.0):
        call["timestep"].fill_(timestep)
        graph.replay()
        assert relative(out, wanted[timestep]) < 1e-2
        assert relative(out, wanted[1000.0 - timestep]) > 2 * relative(out, wanted[timestep])


@pytest.mark.parametrize(
    ("name", "policy"), [("sd", "w8a8"), ("sdxl", "symmetric"), ("dit", "w4a8"), ("flux", "symmetric"), ("flux", "w4a8")]
)
@torch.no_grad()
def test_fused_blocks_compute_what_their_parts_do(name: str, policy: str, make_state, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_CUDA", ())  # integers in tiny layers too
    denoiser = tiny_denoiser(name).eval().requires_grad_(False)
    state = make_state(denoiser, keys=KEYS, **POLICIES[policy])
    for one, other in share_ranges(state):
        state.layers[other] = replace(state.layers[other], act_scale=one.act_scale, act_zero_point=one.act_zero_point)
    pack_denoiser_(denoiser, state, "auto")
    model = denoiser.to("cuda")
    call = inputs(model, "cuda", batch=1)
    got = answer(model, call).clone()
    graphs = Graphs(model).enable()
    replayed = answer(model, call)
    assert len(graphs) == 1
    graphs.disable()
    assert relative(replayed, got) < 1e-3
    fuse_gpu_blocks_(model, enabled=False)
    assert relative(got, answer(model, call)) < 0.05


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_attention_of_flux_is_that_of_its_processor(dtype: torch.dtype, batch: int) -> None:
    """At FLUX's widths, in floats: both kinds of block."""
    torch.manual_seed(0)
    double, single = (FluxAttention(3072, heads=24, dim_head=128, out_dim=3072, bias=True, eps=1e-6, **extra) for extra in FLUX_ATTENTIONS)
    for attn in (double.to("cuda", dtype), single.to("cuda", dtype)):
        attn.norm_q.weight.add_(torch.rand_like(attn.norm_q.weight))
    x, text = torch.randn(batch, 250, 3072).to("cuda", dtype), torch.randn(batch, 77, 3072).to("cuda", dtype)
    angles = torch.rand(327, 64, device="cuda").mul(6).repeat_interleave(2, 1)
    rotary = angles.cos(), angles.sin()
    alone = rotary[0][:250], rotary[1][:250]
    y = flux_heads(double, x, text, rotary)
    got = double.to_out[0](y[:, 77:]), double.to_add_out(y[:, :77]), flux_heads(single, x, None, alone)
    want = *double(x, text, image_rotary_emb=rotary), single(x, image_rotary_emb=alone)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < max(4 * torch.finfo(dtype).eps, 2e-3)  # TF32 products


def share_ranges(state: Any) -> list[tuple[Any, str]]:
    """(layer, name of another that reads the same tensor), as calibration would find them."""
    readers = {"to_q": ("to_k", "to_v"), "add_q_proj": ("add_k_proj", "add_v_proj"), "attn.to_q": ("proj_mlp",)}
    return [
        (layer, other)
        for name, layer in state.layers.items()
        for first, others in readers.items()
        if name.endswith(first) and "attn2" not in name
        for other in (name.removesuffix(first) + one for one in others)
        if other in state.layers
    ]


@pytest.mark.parametrize("name", ["sd", "flux"])
@torch.no_grad()
def test_replays_follow_the_step_and_the_prompt(name: str, make_state) -> None:
    model = packed_on("cuda", name, make_state, "auto", torch.bfloat16)
    calls = [inputs(model, "cuda", torch.bfloat16, batch) for batch in (1, 2, 1)]
    calls[2]["encoder_hidden_states"] = calls[2]["encoder_hidden_states"].flip(-1)
    calls += [calls[0] | {"timestep": torch.full_like(calls[0]["timestep"], step)} for step in (30.0, 700.0)]
    wanted = [answer(model, call) for call in calls]
    graphs = Graphs(model).enable()
    for call, want in zip(calls, wanted, strict=True):
        assert relative(answer(model, call), want) < 1e-2
    assert len(graphs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux"])
@torch.no_grad()
def test_it_compiles_whole_and_once(name: str, make_state) -> None:
    model = packed_on("cuda", name, make_state, "auto", torch.bfloat16)
    call = inputs(model, "cuda", torch.bfloat16)
    wanted = {}
    for timestep in (790.0, 210.0):
        call["timestep"].fill_(timestep)
        wanted[timestep] = answer(model, call).clone()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=False)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for timestep in (210.0, 790.0, 210.0):
            call["timestep"] = torch.full_like(call["timestep"], timestep)
            # bf16 between operators, or not: where inductor fuses them, another code in a hundred turns
            assert relative(answer(compiled, call), wanted[timestep]) < 0.2


@torch.no_grad()
def test_it_goes_to_the_cpu_and_back(make_state) -> None:
    from accelerate import cpu_offload_with_hook

    model = packed_on("cuda", "sd", make_state, "exact")
    call = inputs(model, "cuda")
    want = answer(model, call)
    offloaded, hook = cpu_offload_with_hook(model.to("cpu"), "cuda")
    for _ in range(2):
        assert torch.equal(answer(offloaded, call), want)
        hook.offload()
        assert all(held.device.type == "cpu" for layer in packed_layers(model).values() for held in layer.held_tensors())


@pytest.mark.parametrize("kind", ["linear", "conv"])
@torch.no_grad()
def test_an_image_has_the_same_products_alone_and_in_a_batch(kind: str, make_layer_state) -> None:
    torch.manual_seed(0)
    original = nn.Linear(1280, 640) if kind == "linear" else nn.Conv2d(320, 192, 3, padding=1)
    x = torch.randn((4, 70, 1280) if kind == "linear" else (4, 320, 17, 16)).cuda().bfloat16()
    for bits in (8, 4):
        layer = packed_from_state(make_layer_state(original, bits_w=bits, symmetric=True), original, 1).to("cuda")
        whole = layer(x)
        assert all(torch.equal(layer(x[i : i + 1]), whole[i : i + 1]) for i in range(4))
        assert all(torch.equal(layer(x), whole) for _ in range(20))


@pytest.mark.parametrize(("bits", "bar"), [(8, 0.51), (4, 0.28)])
def test_weights_take_the_memory_they_are_stored_in(bits: int, bar: float, make_layer_state) -> None:
    torch.manual_seed(0)
    originals = [nn.Linear(2048, 2048), nn.Linear(1280, 5120), nn.Conv2d(640, 320, 3, padding=1)]
    states = [make_layer_state(original, bits_w=bits, symmetric=True) for original in originals]
    packed_from_state(states[0], originals[0], 1).to("cuda")  # whatever the first use of the GPU allocates
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    layers = [packed_from_state(state, original, 1).to("cuda") for state, original in zip(states, originals, strict=True)]
    numbers = sum(original.weight.numel() for original in originals)
    assert (torch.cuda.memory_allocated() - before) / (2 * numbers) <= bar
    assert all(layer.form.choice.kernel == "integer" for layer in layers)


def test_steps_stay_on_the_device() -> None:
    step = StepContext(torch.tensor(KEYS))
    step.place_(torch.device("cuda", 0))
    timesteps, table = [torch.tensor(610.0).cuda(), torch.tensor([190.0]).cuda().expand(4)], torch.ones(5).cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for timestep in timesteps:
            step.set_timestep(timestep)
            assert step.row.dtype == torch.int32
            assert step.row.device.type == "cuda"
            step.pick(table)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.row.tolist() == [3]
