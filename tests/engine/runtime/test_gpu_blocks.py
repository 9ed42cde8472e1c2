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
from qdm_cli.engine.runtime import choice, gpu, gpu_fused
from qdm_cli.engine.runtime.choice import Choice, Machine
from qdm_cli.engine.runtime.gpu import prepare_integers
from qdm_cli.engine.runtime.gpu_blocks import GPU_BLOCKS, fuse_gpu_blocks_
from qdm_cli.engine.runtime.modules import pack_denoiser_, packed_from_state
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import SharedInput
from qdm_kernels.attention import op as attention_op


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
        ("sd", {"group_norm_quantize", "layer_norm_quantize", "gelu_quantize", "quantize", "_multiply"}),
        ("sdxl", {"group_norm_quantize", "layer_norm_quantize", "gelu_quantize", "quantize", "_multiply"}),
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
