"""Blocks with norms, activations and sums inside their kernels against the same blocks without, on tiny denoisers of each kind.

CPU kernels stand in for those of the GPU: they have the same calls, and `tests/kernels` compares them.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.runtime import choice, gpu, gpu_blocks, gpu_fused
from qdm_cli.engine.runtime.choice import Choice, Machine
from qdm_cli.engine.runtime.gpu import prepare_integers
from qdm_cli.engine.runtime.gpu_blocks import GPU_BLOCKS, fuse_gpu_blocks_
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_state
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import SharedInput
from qdm_kernels.attention import op as attention_op
from qdm_kernels.rms_norm_rotary.op import rms_norm_rotary_


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors take the way of CUDA tensors, tiny layers run integers too, and the CPU multiplies bf16, as beside GPUs."""
    monkeypatch.setattr(attention_op, "why_not_cpu", lambda: None)
    monkeypatch.setattr(attention_op, "shortest", lambda: 1024)  # attention in bf16 would turn codes at ties, as no GPU does
    monkeypatch.setattr("qdm_cli.engine.runtime.fused.LEAST_VALUES", 0)  # what a block falls back to is that of large images
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device, op: cls("cuda", (9, 0), triton=True)))
    monkeypatch.setattr(choice, "_CUDA", ())
    monkeypatch.setattr(gpu, "possible", lambda: True)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Calls of the fused kernels."""
    calls: dict[str, int] = {}

    def count(name: str) -> None:
        original = getattr(gpu_fused, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return original(*args, **kwargs)

        monkeypatch.setattr(gpu_fused, name, call)

    for name in ("group_norm_quantize", "layer_norm_quantize", "gelu_quantize", "quantize", "_multiply"):
        count(name)
    return calls


@pytest.mark.parametrize("policy", [{"symmetric": True, "bits_w": 8}, {}], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("sd", {"group_norm_quantize", "layer_norm_quantize", "quantize", "_multiply"}),
        ("sdxl", {"group_norm_quantize", "layer_norm_quantize", "quantize", "_multiply"}),
        ("dit", {"layer_norm_quantize", "_multiply"}),
        ("flux", {"layer_norm_quantize", "quantize", "_multiply"}),
    ],
)
@torch.no_grad()
def test_a_fused_denoiser_computes_the_same(name: str, kernels: set[str], policy: dict, counted, make_state) -> None:
    model = tiny_denoiser(name).eval().requires_grad_(False)
    state = make_state(model, **policy)
    _one_range_per_reader(state)
    pack_denoiser_(model, state, "auto")
    side = getattr(model.config, "sample_size", None) or 8
    torch.manual_seed(0)
    call = example_inputs(model, CallShape(1, 1, (side, side)), "cpu")
    call["timestep"] = torch.full((1,), 390.0)
    assert any(type(module) in GPU_BLOCKS.values() for module in model.modules())
    got = model(**call, return_dict=False)[0]
    assert set(counted) == kernels
    fuse_gpu_blocks_(model, enabled=False)
    assert not any(type(module) in GPU_BLOCKS.values() for module in model.modules())
    want = model(**call, return_dict=False)[0]
    # a norm that differs in its last bit turns a code now and then; a wrong operand gives 0.1 and more
    assert float((got - want).norm() / want.norm()) < 2e-2


def _flux(make_state, *, shared: bool = True, joint: bool = False, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Any]]:
    """A packed FLUX of one block of each kind, and a call of it. joint: the CPU's operand stands in for the GPU's."""
    model = tiny_denoiser("flux").eval().requires_grad_(False)
    state = make_state(model, symmetric=True, bits_w=8)
    if shared:
        _one_range_per_reader(state)
    pack_denoiser_(model.to(dtype), state, "auto")
    for layer in model.modules():
        if joint and isinstance(reuse := getattr(layer, "reuse", None), SharedInput):
            reuse._prepared = prepare_integers(layer, *_rows(reuse.layers()))
    torch.manual_seed(0)
    call = example_inputs(model, CallShape(2, 2, (8, 8)), "cpu", dtype) | {"timestep": torch.full((2,), 390.0), "return_dict": False}
    return model, call


@pytest.fixture
def turned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """(first token, whether values move too) of every call of the kernel of heads."""
    calls: list[tuple[int, bool]] = []

    def call(out: Any, heads: Any, rotary: Any, **options: Any) -> None:
        calls.append((options.get("at", 0), heads[2] is not None))
        rms_norm_rotary_(out, heads, rotary, **options)

    monkeypatch.setattr(gpu_blocks, "rms_norm_rotary_", call)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("how", [{}, {"joint": True}, {"shared": False}], ids=["together", "one product", "ranges of their own"])
@torch.no_grad()
def test_flux_with_heads_turned_in_place_computes_the_same(how: dict, dtype: torch.dtype, turned, make_state) -> None:
    model, call = _flux(make_state, dtype=dtype, **how)
    got = model(**call)[0]
    text = call["encoder_hidden_states"].shape[1]
    assert turned == [(text, True), (0, True)] + [(0, False)] * how.get("shared", True)
    fuse_gpu_blocks_(model, enabled=False)
    want = model(**call)[0]
    assert got.dtype == dtype
    assert float((got - want).norm() / want.norm()) < (2e-2 if dtype == torch.float32 else 5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@torch.no_grad()
def test_attention_of_flux_is_that_of_its_processor(dtype: torch.dtype) -> None:
    """In floats, where nothing hides a wrong row: both kinds of block, two images, weights that are not 1."""
    model = tiny_denoiser("flux").eval()
    for norm in (module for module in model.modules() if isinstance(module, nn.RMSNorm)):
        norm.weight.copy_(torch.rand_like(norm.weight) + 0.5)
    model.to(dtype)
    double, single = model.transformer_blocks[0].attn, model.single_transformer_blocks[0].attn
    x, text = torch.randn(2, 12, 64).to(dtype), torch.randn(2, 5, 64).to(dtype)
    rotary = model.pos_embed(torch.arange(17 * 3).view(17, 3).float())
    y = gpu_blocks.flux_heads(double, x, text, rotary)
    got = double.to_out[0](y[:, 5:]), double.to_add_out(y[:, :5]), gpu_blocks.flux_heads(single, x, None, (rotary[0][:12], rotary[1][:12]))
    want = *double(x, text, image_rotary_emb=rotary), single(x, image_rotary_emb=(rotary[0][:12], rotary[1][:12]))
    for a, b in zip(got, want, strict=True):
        assert float((a - b).norm() / b.norm()) < 4 * torch.finfo(dtype).eps


@torch.no_grad()
def test_whatever_else_attention_of_flux_does_stays_with_diffusers(make_state) -> None:
    model, call = _flux(make_state)
    attn = model.transformer_blocks[0].attn
    x, text, rotary = torch.randn(2, 4, 64), torch.randn(2, 3, 64), model.pos_embed(torch.zeros(7, 3))

    def refused(attn: nn.Module = attn, rotary: Any = rotary) -> bool:
        return gpu_blocks.flux_heads(attn, x, text, rotary) is None

    assert not refused()
    for wrong in (None, torch.zeros(7, 32), (rotary[0], rotary[1][1:]), (torch.complex(*rotary), rotary[1])):
        assert refused(rotary=wrong)
    seen: list[int] = []
    with attn.norm_q.register_forward_hook(lambda *_: seen.append(1)):
        assert refused()
        model(**call)
    assert seen
    for path, value in (
        ("norm_k", nn.LayerNorm(32)),
        ("fused_projections", True),
        ("norm_added_q.eps", 1e-3),
        ("processor._parallel_config", 1),
    ):
        twin = copy.deepcopy(attn)
        *owner, name = path.split(".")
        setattr(getattr(twin, owner[0]) if owner else twin, name, value)
        assert refused(twin), path
    assert not refused()


def test_streams_that_lie_side_by_side_are_not_copied() -> None:
    x = torch.arange(2 * 7 * 4.0).view(2, 7, 4)
    whole = gpu_blocks._adjacent(x[:, :3], x[:, 3:])
    assert whole.data_ptr() == x.data_ptr()
    assert torch.equal(whole, x)
    for first, second in (
        (x[:, 3:], x[:, :3]),
        (x[:, :3], x[:, 4:]),
        (x[:, :3], x[:, 3:].clone()),
        (x[:, :3], x[:, 3:6]),
        (x[:1, :3], x[1:, :4]),
    ):
        assert torch.equal(gpu_blocks._adjacent(first, second), torch.cat([first, second], 1))


def _one_range_per_reader(state: Any) -> None:
    """Layers that read one tensor have one range, as calibration gives them."""
    for name, layer in state.layers.items():
        for first, others in {"to_q": ("to_k", "to_v"), "add_q_proj": ("add_k_proj", "add_v_proj")}.items():
            if name.endswith(first) and "attn2" not in name:
                for other in others:
                    twin = state.layers[name.removesuffix(first) + other]
                    twin.act_scale.copy_(layer.act_scale)
                    twin.act_zero_point.copy_(layer.act_zero_point)
                if (mlp := name.replace("attn.to_q", "proj_mlp")) in state.layers:
                    state.layers[mlp].act_scale.copy_(layer.act_scale)
                    state.layers[mlp].act_zero_point.copy_(layer.act_zero_point)


@torch.no_grad()
def test_copies_and_other_modes_keep_working(make_state) -> None:
    model = tiny_denoiser("dit").eval().requires_grad_(False)
    pack_denoiser_(model, make_state(model), "auto")
    twin: nn.Module = copy.deepcopy(model)
    assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]
    assert {name for name, _ in twin.named_buffers()} == {name for name, _ in model.named_buffers()}


@torch.no_grad()
def test_readers_in_half_precision_have_no_joint_operand(make_state, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_denoiser("dit").eval().requires_grad_(False)
    pack_denoiser_(model, make_state(model, symmetric=True, bits_w=8), "auto")
    attention = model.transformer_blocks[0].attn1
    layers = [attention.to_q, attention.to_k, attention.to_v]
    small = Choice("float", "too small")
    monkeypatch.setattr(gpu, "make_form", lambda layer: gpu.Form(small))
    for layer in layers:
        layer.set_mode_("exact")  # forgets the form that it has
        layer.set_mode_("auto")
    assert all(layer.form.choice is small for layer in layers)
    monkeypatch.setattr(gpu, "prepare_integers", lambda *parts: pytest.fail("an operand that nobody reads"))
    assert gpu.join(layers) is None


@torch.no_grad()
def test_compiled_queries_keys_and_values_are_one_product(make_state) -> None:
    model = tiny_denoiser("dit").eval().requires_grad_(False)
    state = make_state(model, symmetric=True, bits_w=8)
    _one_range_per_reader(state)
    pack_denoiser_(model, state, "auto")
    prepared = model.transformer_blocks[0].attn1.to_q.reuse.joint()
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer) and layer.choice(torch.zeros(1)).kernel == "integer"]
    shared = sum(isinstance(layer.reuse, SharedInput) for layer in layers)
    if prepared is None:  # the CPU's operand stands in for the GPU's
        for layer in layers:
            if isinstance(layer.reuse, SharedInput):
                layer.reuse._prepared = prepare_integers(layer, *_rows(layer.reuse.layers()))
    torch.manual_seed(0)
    call = example_inputs(model, CallShape(2, 2, (8, 8)), "cpu") | {"timestep": torch.full((2,), 390.0), "return_dict": False}
    widths: list[int] = []

    def note(graph: torch.fx.GraphModule, example: Any) -> Any:
        products = [node for node in graph.graph.nodes if "linear_w8a8" in str(node.target)]
        widths.extend(node.args[3].meta["example_value"].numel() for node in products)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(model, backend=note, fullgraph=True)
    got = [compiled(**call)[0] for _ in range(2)]
    # DiT embeds the timestep a second time for its last norm: two layers more
    assert len(widths) == len(layers) - shared * 2 // 3 + 2
    assert widths.count(3 * 64) == shared // 3
    assert torch.equal(got[0], got[1])
    fuse_gpu_blocks_(model, enabled=False)
    want = model(**call)[0]
    assert float((got[0] - want).norm() / want.norm()) < 2e-2


def _rows(layers: list[Any]) -> tuple[Any, ...]:
    parts = zip(*(layer.stored_parts() for layer in layers), strict=True)
    return tuple(None if part[0] is None else torch.cat(part) for part in parts)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [None, 64])
def test_layers_of_few_rows_read_their_packed_weights(bits: int, group: int | None, make_layer_state) -> None:
    original = nn.Linear(128, 96)
    state = make_layer_state(original, bits_w=bits, bits_a=None, timestep_aware=False, group_size=group)
    layer = packed_from_state(state, original, 1)
    layer.place_(few_rows=True, dtype=torch.float32)
    x = torch.randn((2, 128), generator=torch.Generator().manual_seed(0))
    want = torch.nn.functional.linear(x, layer.dequantized_weight(), layer._buffers["bias"])
    assert (layer(x) - want).norm() < 1e-5 * want.norm()
    assert layer.form.choice.kernel == "weights"
    assert layer.form.prepared.op == f"linear_w{bits}a16"
