"""Attention of exported models on CPUs with native bf16: which calls are replaced, and that nothing else of a processor changes."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch.nn import functional as F

from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.runtime.attention import speed_up_attention_
from qdm_kernels.attention import op
from qdm_kernels.native import attention as native


@pytest.fixture
def native_bf16(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """A CPU that multiplies bf16; the list holds the shapes of replaced products."""
    shapes: list[tuple[int, ...]] = []
    real = op.attention

    def watched(q, k, v, scale=None, *, eight_bit=False):
        shapes.append(tuple(q.shape))
        return real(q, k, v, scale, eight_bit=eight_bit)

    monkeypatch.setattr(op, "why_not_cpu", lambda: None)
    monkeypatch.setattr(op, "shortest", lambda: 16)
    monkeypatch.setattr(op, "attention", watched)
    return shapes


def call() -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    config = tiny_denoiser("sd").config
    size = config.sample_size
    return {
        "sample": torch.randn(2, config.in_channels, size, size, generator=rng),
        "timestep": torch.tensor(400),
        "encoder_hidden_states": torch.randn(2, 7, config.cross_attention_dim, generator=rng),
    }


def test_long_self_attention_is_replaced_and_close(native_bf16) -> None:
    unet = tiny_denoiser("sd").eval()
    with torch.no_grad():
        want = unet(**call()).sample
        assert speed_up_attention_(unet, enabled=True) > 0
        got = unet(**call()).sample
    assert native_bf16
    assert all(shape[2] >= 16 for shape in native_bf16)
    assert 0 < (got - want).norm() / want.norm() < 0.01


def test_switching_it_off_restores_the_processors(native_bf16) -> None:
    unet = tiny_denoiser("sd").eval()
    before = {name: type(processor) for name, processor in unet.attn_processors.items()}
    speed_up_attention_(unet, enabled=True)
    for name, processor in unet.attn_processors.items():
        assert isinstance(processor, before[name])
        # diffusers drops the arguments that a processor's signature does not name
        assert inspect.signature(processor.__call__) == inspect.signature(before[name]().__call__)
    assert speed_up_attention_(unet, enabled=False) == 0
    assert {name: type(processor) for name, processor in unet.attn_processors.items()} == before
    with torch.no_grad():
        unet(**call())
    assert not native_bf16


def test_a_cpu_without_bf16_keeps_torchs_own_unless_compiled_float32_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "why_not_cpu", lambda: "no native bf16")
    monkeypatch.setattr(native, "products", lambda: native.Products.NONE)
    assert speed_up_attention_(tiny_denoiser("sd"), enabled=True) == 0
    monkeypatch.setattr(native, "products", lambda: native.Products.FLOATS)
    assert speed_up_attention_(tiny_denoiser("sd"), enabled=True) > 0


@pytest.mark.parametrize(
    "extra", [{"attn_mask": torch.zeros(32, 32)}, {"is_causal": True}, {"dropout_p": 0.5}], ids=lambda extra: next(iter(extra))
)
def test_products_with_more_to_them_are_left_to_torch(extra: dict, native_bf16) -> None:
    class Processor:
        def __call__(self, attn, q):
            return F.scaled_dot_product_attention(q, q, value=q, **extra)

    class Attention(torch.nn.Module):
        processor = Processor()

    module = Attention()
    assert speed_up_attention_(module, enabled=True) == 1
    module.processor(module, torch.randn(1, 1, 32, 8))
    assert not native_bf16
    extra.clear()
    module.processor(module, torch.randn(1, 1, 32, 8))
    assert native_bf16 == [(1, 1, 32, 8)]


FACTOR = 1.0


class Scaled:
    def __call__(self, attn, q):
        return F.scaled_dot_product_attention(q, q, q) * FACTOR


class Attention(torch.nn.Module):
    def __init__(self, processor):
        super().__init__()
        self.processor = processor


def test_a_rewired_processor_sees_what_changes_around_it(native_bf16, monkeypatch: pytest.MonkeyPatch) -> None:
    module, q = Attention(Scaled()), torch.randn(1, 1, 32, 8)
    speed_up_attention_(module, enabled=True)
    once = module.processor(module, q)
    assert native_bf16 == [(1, 1, 32, 8)]
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", 2.0)
    assert torch.equal(module.processor(module, q), 2 * once)
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: torch.ones_like(q))
    assert (module.processor(module, q) == 2).all()
    assert len(native_bf16) == 2


@pytest.mark.parametrize(
    "code",
    [
        "from torch.nn.functional import scaled_dot_product_attention\n"
        "class P:\n    def __call__(self, attn, q):\n        F.pad(q, (0, 1))\n        return scaled_dot_product_attention(q, q, q)",
        "class Base:\n    def __call__(self, attn, q):\n        return F.scaled_dot_product_attention(q, q, q)\n"
        "class P(Base):\n    def __call__(self, attn, q):\n"
        "        return super().__call__(attn, q) if len(q) else F.scaled_dot_product_attention(q, q, q)",
        "count = 0\nclass P:\n    def __call__(self, attn, q):\n        global count\n        count += 1\n"
        "        return F.scaled_dot_product_attention(q, q, q)",
    ],
    ids=["imported by name", "of a parent", "writes a global"],
)
def test_what_cannot_be_rewired_is_replaced_all_the_same(code: str, native_bf16) -> None:
    names: dict = {"F": F, "__name__": "elsewhere"}
    exec(code, names)
    module = Attention(names["P"]())
    speed_up_attention_(module, enabled=True)
    module.processor(module, torch.randn(1, 1, 32, 8))
    assert native_bf16 == [(1, 1, 32, 8)]
    assert names.get("count", 1) == 1
