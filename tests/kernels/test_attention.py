"""Blocked bf16 attention by torch's operators against float64, and which implementation runs where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qdm_kernels.attention import cpu, op, reference
from qdm_kernels.native import attention as native
from qdm_kernels.native.attention import Products


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 8), (2, 3, 65, 130, 40), (1, 2, 300, 77, 64), (1, 1, 0, 5, 8)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_close_to_float64(shape: tuple[int, ...], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "CACHE_BYTES", 1)  # blocks of 64 queries: several, and a shorter last one
    b, h, length, keys, width = shape
    q, k, v = (
        draw(b, h, length, width, dtype=dtype),
        draw(b, h, keys, width, seed=1, dtype=dtype),
        draw(b, h, keys, width, seed=2, dtype=dtype),
    )
    got, want = cpu.attention(q, k, v, width**-0.5), reference.attention(q.double(), k, v, width**-0.5)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert (got.double() - want).norm() <= 0.01 * want.norm()
    tiled = cpu.tiled(q, k, v, width**-0.5)
    assert tiled.dtype == dtype
    assert (tiled.double() - want).norm() <= 0.01 * want.norm()
    chosen = op.attention(q, k, v)
    assert chosen.dtype == dtype
    assert (chosen.double() - want).norm() <= 0.01 * want.norm()


def test_a_common_part_of_the_keys_costs_no_precision() -> None:
    """Scores of several hundred, whose bf16 steps would be larger than 1, differ by little."""
    q, k, v = (draw(1, 2, 130, 40, seed=seed) for seed in (0, 1, 2))
    k = k + 100
    want = reference.attention(q.double(), k.double(), v.double(), 40**-0.5)
    assert (op.attention(q, k, v).double() - want).norm() <= 0.01 * want.norm()


def test_the_output_lies_as_processors_read_it() -> None:
    q, k, v = (draw(2, 3, 70, 16, seed=seed) for seed in (0, 1, 2))
    assert cpu.attention(q, k, v, 0.25).transpose(1, 2).is_contiguous()


def test_the_scale_counts_and_large_scores_do_not_overflow() -> None:
    q, k, v = (30 * draw(1, 1, 80, 16, seed=seed) for seed in (0, 1, 2))
    sharp, flat = op.attention(q, k, v), op.attention(q, k, v, 1e-6)
    assert torch.isfinite(sharp).all()
    torch.testing.assert_close(flat, v.mean(2, keepdim=True).expand_as(flat), rtol=0.02, atol=0.2)
    assert (sharp - flat).norm() > flat.norm()


def test_strided_queries_as_processors_pass_them() -> None:
    q, k, v = (draw(2, 70, 3, 16, seed=seed).transpose(1, 2) for seed in (0, 1, 2))
    want = reference.attention(q, k, v, 0.25)
    assert (op.attention(q, k, v) - want).norm() <= 0.01 * want.norm()


@pytest.mark.parametrize(
    "shapes", [((4, 8), (4, 8)), ((1, 2, 4, 8), (1, 3, 4, 8)), ((1, 1, 4, 8), (1, 1, 0, 8)), ((1, 1, 4, 8), (1, 1, 4, 9))], ids=str
)
def test_other_shapes_are_refused(shapes) -> None:
    with pytest.raises(ValueError, match="got"):
        op.attention(draw(*shapes[0]), draw(*shapes[1]), draw(*shapes[1]))


@pytest.mark.parametrize(
    ("kind", "least"),
    [(Products.VECTORS, 1024), (Products.SHORTS, 256), (Products.TILES, None), (Products.FLOATS, None), (Products.NARROW, None)],
)
def test_8_bits_pay_beside_slower_products_of_this_cpu(kind: Products, least: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "products", lambda: kind)
    monkeypatch.setattr(native, "in_bytes", lambda: True)
    monkeypatch.setattr(op, "has_tiles", lambda: False)
    taken = [n for n in (64, 255, 256, 1023, 1024, 4096) if op.bytes_pay(draw(1, 1, n, 8), draw(1, 1, 4096, 8))]
    assert taken == [n for n in (64, 255, 256, 1023, 1024, 4096) if least is not None and n >= least]
    assert not op.bytes_pay(draw(1, 1, 4096, 8), draw(1, 1, 77, 8))
    monkeypatch.setattr(op, "has_tiles", lambda: True)  # which the compiler does not know of, or a cap forbids
    assert not op.bytes_pay(draw(1, 1, 4096, 8), draw(1, 1, 4096, 8))


def test_few_keys_are_read_in_float32_beside_fixed_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "products", lambda: Products.SHORTS)
    assert [native.fastest(draw(1, 1, n, 8)) for n in (77, 127, 128)] == [Products.FLOATS, Products.FLOATS, Products.SHORTS]
    monkeypatch.setattr(native, "products", lambda: Products.VECTORS)
    assert native.fastest(draw(1, 1, 77, 8)) is Products.VECTORS


def test_every_refusal_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "why_not_cpu", lambda: None)
    monkeypatch.setattr(native, "products", lambda: Products.NONE)
    monkeypatch.setattr(op, "has_tiles", lambda: False)
    long = draw(1, 1, 1024, 8)
    assert op.why_not(long, long, long) is None
    assert "below 1024" in (op.why_not(long, long[:, :, :77], long[:, :, :77]) or "")
    assert "float64" in (op.why_not(long.double(), long, long) or "")
    assert op.why_not(long.clone().requires_grad_(), long, long) == "gradients"
    assert "equal heads" in (op.why_not(long, long[0], long[0]) or "")
    monkeypatch.setattr(op, "has_tiles", lambda: True)
    assert op.why_not(long[:, :, :300], long[:, :, :300], long[:, :, :300]) is None
    assert "tiles" in (op.why_not(*[long.bfloat16()] * 3) or "")
    monkeypatch.setattr(native, "products", lambda: Products.TILES)
    assert op.why_not(*[long.bfloat16()] * 3) is None
    assert op.why_not(long, long[:, :, :77], long[:, :, :77]) is None
    assert "below 16" in (op.why_not(long, long[:, :, :5], long[:, :, :5]) or "")
    monkeypatch.setattr(native, "products", lambda: Products.VECTORS)
    assert "below 256" in (op.why_not(long, long[:, :, :77], long[:, :, :77]) or "")
    monkeypatch.setattr(op, "has_tiles", lambda: False)
    assert op.why_not(long, long[:, :, :77], long[:, :, :77]) is None
    assert "below 16" in (op.why_not(long, long[:, :, :5], long[:, :, :5]) or "")
    monkeypatch.setattr(op, "why_not_cpu", lambda: "no native bf16")
    assert op.why_not(long, long, long) == "no native bf16"
    monkeypatch.setattr(native, "products", lambda: Products.FLOATS)
    assert op.why_not(long, long, long) is None
    assert op.why_not(long, long[:, :, :77], long[:, :, :77]) is None
    assert "below 64" in (op.why_not(long, long[:, :, :49], long[:, :, :49]) or "")
    monkeypatch.setattr(native, "products", lambda: Products.NARROW)
    assert op.why_not(long, long[:, :, :77], long[:, :, :77]) is None
    assert "below 77" in (op.why_not(long, long[:, :, :64], long[:, :, :64]) or "")
    assert "one dtype" in (op.why_not(long, long.bfloat16(), long.bfloat16()) or "")


@pytest.mark.parametrize(
    ("products", "tiles", "chosen"),
    [
        (Products.TILES, True, native.attention),
        (Products.VECTORS, True, cpu.tiled),
        (Products.NONE, True, cpu.tiled),
        (Products.VECTORS, False, native.attention),
        (Products.NONE, False, cpu.attention),
        (Products.FLOATS, False, native.attention),
        (Products.FLOATS, True, cpu.tiled),
        (Products.NARROW, False, native.attention),
        (Products.NARROW, True, cpu.tiled),
    ],
)
def test_the_fastest_implementation_runs(products, tiles, chosen, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "products", lambda: products)
    monkeypatch.setattr(op, "has_tiles", lambda: tiles)
    x = draw(1, 1, 4, 8)
    assert op._implementation(x, x, x, 1.0) is chosen
    assert op._implementation(x, x.bfloat16(), x.bfloat16(), 1.0) is (cpu.tiled if tiles else cpu.attention)


@pytest.mark.parametrize(
    ("flags", "cap", "runs", "tiles"),
    [
        ({"avx512_bf16": True}, "", True, False),
        ({"avx512_bf16": True}, "AVX512_CORE_VNNI", False, False),
        ({"amx_bf16": True}, "", True, True),
        ({"amx_bf16": True}, "AVX512_CORE_BF16", True, True),
        ({"avx2": True}, "", False, False),
    ],
)
def test_the_probe_reads_flags_and_the_cap(flags: dict, cap: str, runs: bool, tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags, raising=False)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", cap)
    assert (op.why_not_cpu.__wrapped__() is None) == runs
    assert op.has_tiles() == tiles
