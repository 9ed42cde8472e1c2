"""Fused blocks on CPUs against the blocks of diffusers they stand for."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from qdm_cli.engine.bench.denoisers import quantized_state, seeded_inputs
from qdm_cli.engine.quant.attention import AttentionProducts, attach_products_
from qdm_cli.engine.quant.state import AttentionDecision
from qdm_cli.engine.runtime import fused
from qdm_cli.engine.runtime.attention import speed_up_attention_
from qdm_cli.engine.runtime.fused import FUSED, fuse_blocks_
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.tune import in_mode, tune_
from qdm_kernels.native import attention as native_attention
from qdm_kernels.native import build, tiles


@pytest.fixture(scope="module")
def packed() -> tuple[nn.Module, dict[str, Tensor]]:
    """A U-Net with every kind of block, int4 weights (integers on every CPU), and the arguments of a call."""
    torch.manual_seed(0)
    down, up = ["CrossAttnDownBlock2D", "DownBlock2D"], ["UpBlock2D", "CrossAttnUpBlock2D"]
    sizes = {"sample_size": 16, "cross_attention_dim": 32, "attention_head_dim": 4, "block_out_channels": [64, 128]}
    unet = UNet2DConditionModel(**sizes, layers_per_block=1, down_block_types=down, up_block_types=up).eval().requires_grad_(False)
    call = seeded_inputs(unet, 2, 16)
    with torch.no_grad():
        state = quantized_state(unet, call, 4)
    pack_denoiser_(unet, state, mode="auto")
    return unet, call


@pytest.fixture(autouse=True)
def integers_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdm_cli.engine.runtime.choice.SMALL_PRODUCT", 0)
    monkeypatch.setattr("qdm_cli.engine.runtime.fused.LEAST_VALUES", 0)
    monkeypatch.setattr("qdm_kernels.blocks.BLOCK_BYTES", 1 << 14)  # several blocks per tensor, and a shorter last one
    monkeypatch.setattr(fused, "HIDDEN_BYTES", 1)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_block_equals_its_parent_but_for_ties(packed, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    if dtype == torch.float32:  # attention in bf16 would multiply a tie that falls the other way
        monkeypatch.setattr("qdm_kernels.attention.op.why_not_cpu", lambda: "float32 wanted")
    unet, call = copy.deepcopy(packed[0]).to(dtype), packed[1]
    call = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in call.items()}
    for layer in unet.modules():
        if isinstance(layer, PackedLayer):
            layer._forget_()
    fuse_blocks_(unet, enabled=True)
    seen: dict[type, list[float]] = {kind: [] for kind in FUSED.values()}

    def compare(block: nn.Module, args: tuple, kwargs: dict, got: Tensor) -> None:
        kind = type(block)
        inner = block._modules.get("transformer_blocks")
        with torch.no_grad():
            if inner is not None:  # these are compared one by one: here they would multiply a tie of what lies around them
                block.transformer_blocks = nn.ModuleList()
                got = block.forward(*args, **kwargs)
            block.__class__ = kind.__mro__[1]
            want = block.forward(*args, **kwargs)
        block.__class__ = kind
        if inner is not None:
            block.transformer_blocks = inner
        got, want = (y if torch.is_tensor(y) else y[0] for y in (got, want))
        assert got.dtype == dtype
        seen[kind].append(float((got.float() - want.float()).norm() / want.float().norm()))

    for block in unet.modules():
        if type(block) in seen:
            block.register_forward_hook(compare, with_kwargs=True)
    unet(**call)
    bound = 2e-3 if dtype == torch.float32 else 2e-2  # the parent rounds to bf16 before it quantizes
    for kind, errors in seen.items():
        assert errors, kind
        assert max(errors) <= bound, (kind, errors)


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
def test_norms_before_attention_go_straight_to_codes(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-attention by one product of three layers, cross-attention by its queries' own; a hook on a norm is served."""
    unet, call = copy.deepcopy(packed[0]), packed[1]
    tune_(unet, "auto")
    blocks = [block for block in unet.modules() if type(block) is fused.FusedBasicTransformerBlock]
    rows: list[int] = []
    real = fused.linear_op.linear

    def watched(codes: Tensor, *args, **kwargs) -> Tensor:
        y = real(codes, *args, **kwargs)
        rows.append(y.shape[-1])
        return y

    monkeypatch.setattr(fused.linear_op, "linear", watched)
    x = torch.randn(2, 64, blocks[0].attn1.to_q.spec.inputs, generator=torch.Generator().manual_seed(0))
    plain = fused._projections(blocks[0].attn1, blocks[0].norm1, x, None)
    assert rows == [3 * x.shape[-1]]
    rows.clear()
    fused._projections(blocks[0].attn2, blocks[0].norm2, x, call["encoder_hidden_states"])
    assert rows[0] == x.shape[-1]
    seen: list[Tensor] = []
    blocks[0].norm1.register_forward_hook(lambda module, args, out: seen.append(out))
    again = fused._projections(blocks[0].attn1, blocks[0].norm1, x, None)
    assert len(seen) == 1
    for one, other in zip(plain, again, strict=True):
        assert (one - other).norm() <= 2e-3 * other.norm()


@torch.no_grad()
@pytest.mark.skipif(tiles.why_not() is not None, reason=str(tiles.why_not()))
@pytest.mark.skipif(native_attention.products() is native_attention.Products.NONE, reason="no compiled attention here")
@pytest.mark.parametrize("with_factors", [False, True], ids=["", "factors per input"])
def test_attention_goes_straight_to_the_codes_of_its_projection(packed, with_factors: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = copy.deepcopy(packed[0])
    tune_(unet, "auto")
    block = next(block for block in unet.modules() if type(block) is fused.FusedBasicTransformerBlock)
    last, width = block.attn1.to_out[0], block.attn1.to_q.spec.inputs
    if with_factors:
        last._buffers["pre_scale"] = torch.rand(last.spec.inputs, generator=torch.Generator().manual_seed(1)) + 0.5
    monkeypatch.setattr(fused.attention_op, "why_not", lambda q, k, v: None)
    monkeypatch.setattr(fused.attention_op, "_implementation", lambda *_: native_attention.attention)
    made: list[Tensor | None] = []
    real = fused.attention_op.codes
    monkeypatch.setattr(fused.attention_op, "codes", lambda *args, **kwargs: made.append(real(*args, **kwargs)) or made[-1])
    x = torch.randn(2, 64, width, generator=torch.Generator().manual_seed(0))
    got = fused._attend(block.attn1, block.norm1, x, None)
    assert made[0] is not None
    assert made[0].dtype == last.prepared.code_dtype
    monkeypatch.setattr(fused.attention_op, "codes", lambda *args, **kwargs: None)
    want = fused._attend(block.attn1, block.norm1, x, None)
    assert (got - want).norm() <= 2e-3 * (want - x).norm()
    assert not torch.equal(want, x)


@torch.no_grad()
def test_products_are_as_coarse_as_what_they_multiply(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Self-attention of 8-bit layers in 8 bits; not that to a prompt, nor where one of the layers runs in floating point."""
    unet, call = copy.deepcopy(packed[0]), packed[1]
    tune_(unet, "auto")
    block = next(block for block in unet.modules() if type(block) is fused.FusedBasicTransformerBlock)
    asked: list[bool] = []
    monkeypatch.setattr(fused.attention_op, "why_not", lambda q, k, v: None)
    monkeypatch.setattr(fused.attention_op, "codes", lambda *args, eight_bit: asked.append(eight_bit))
    x = torch.randn(2, 64, block.attn1.to_q.spec.inputs, generator=torch.Generator().manual_seed(0))
    fused._attend(block.attn1, block.norm1, x, None)
    fused._attend(block.attn2, block.norm2, x, call["encoder_hidden_states"])
    plain = nn.Linear(block.attn1.to_v.spec.inputs, block.attn1.to_v.spec.outputs)
    block.attn1.to_v = plain
    fused._attend(block.attn1, block.norm1, x, None)
    assert asked == [True, False, False] if tiles.why_not() is None else not any(asked)


@torch.no_grad()
def test_processors_of_diffusers_know_what_they_multiply(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same rule in attentions that no fused block computes."""
    unet, call = copy.deepcopy(packed[0]), packed[1]
    tune_(unet, "auto")
    monkeypatch.setattr(fused.attention_op, "why_not_here", lambda: None)
    speed_up_attention_(unet, enabled=True)
    block = next(block for block in unet.modules() if type(block) is fused.FusedBasicTransformerBlock)
    asked: list[bool] = []
    monkeypatch.setattr(fused.attention_op, "why_not", lambda q, k, v: None)
    monkeypatch.setattr(fused.attention_op, "attention", lambda q, k, v, scale, *, eight_bit: asked.append(eight_bit) or q)
    x = torch.randn(2, 64, block.attn1.to_q.spec.inputs, generator=torch.Generator().manual_seed(0))
    block.attn1(x)
    block.attn1(x, None)
    block.attn2(x, encoder_hidden_states=call["encoder_hidden_states"])
    for name in ("to_out", "to_k"):
        layer = block.attn1.to_v.spec
        plain, packed_layer = nn.Linear(layer.inputs, layer.outputs), getattr(block.attn1, name)
        setattr(block.attn1, name, nn.ModuleList([plain, nn.Identity()]) if name == "to_out" else plain)
        block.attn1(x)
        setattr(block.attn1, name, packed_layer)
    block.attn1(x)
    assert asked == [True, True, False, False, False, True]


@torch.no_grad()
def test_products_in_8_bits_stay_close(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    unet = copy.deepcopy(packed[0])
    tune_(unet, "auto")
    block = next(block for block in unet.modules() if type(block) is fused.FusedBasicTransformerBlock)
    x = torch.randn(1, 1024, block.attn1.to_q.spec.inputs, generator=torch.Generator().manual_seed(0))
    q = torch.empty(1, 4, 1024, 16)
    if fused.attention_op.why_not(q, q, q) is not None or not fused.attention_op.bytes_pay(q, q):
        pytest.skip("no products in 8 bits here, or slower ones")
    got = fused._attend(block.attn1, block.norm1, x, None)
    monkeypatch.setenv("QDM_ATTENTION_BITS", "16")
    want = fused._attend(block.attn1, block.norm1, x, None)
    assert not torch.equal(got, want)
    assert (got - want).norm() <= 0.03 * (want - x).norm()


@torch.no_grad()
def test_auto_multiplies_as_they_come_what_exact_rounds(packed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized products are simulated, which takes several times as long as the rest of an SD1.5-shaped call."""
    monkeypatch.setattr(fused.attention_op, "why_not_here", lambda: None)
    plain, call = copy.deepcopy(packed[0]), packed[1]
    unet = copy.deepcopy(plain)
    attentions = {name: module for name, module in unet.named_modules() if hasattr(module, "processor")}
    for name, module in attentions.items():
        products = AttentionProducts(AttentionDecision(name, 4, 4, timestep_aware=False), 1)
        products.scales.fill_(0.3)
        attach_products_(module, products)
    tables = [module for module in unet.modules() if isinstance(module, AttentionProducts)]
    wants = {}
    for mode in ("auto", "exact"):
        tune_(plain, mode)
        wants[mode] = plain(**call).sample
    for again in (False, True):
        tune_(unet, "auto")
        before = [table.calls for table in tables]
        assert torch.equal(unet(**call).sample, wants["auto"]), again
        assert [table.calls for table in tables] == before
        with in_mode(unet, "exact"):
            assert not any(hasattr(type(module.processor), "original") for module in attentions.values())
            rounded = unet(**call).sample
        assert [table.calls for table in tables] == [calls + 1 for calls in before]
        assert (rounded - wants["exact"]).norm() > 0.01 * wants["exact"].norm()
