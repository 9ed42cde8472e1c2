"""The Triton weight-only layer: words hold every code, sums are those of float64, whatever the tile."""

from __future__ import annotations

import random

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.gemm.tiles import WEIGHT_ONLY_TILES, Tile
from qdm_kernels.linear_w4a16 import op, reference
from qdm_kernels.linear_w4a16 import triton as kernels


def draw(m: int, n: int, k: int, groups: int | None, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x float16, codes, scale, zero point, bias."""
    rng = torch.Generator().manual_seed(seed)
    shape = (n,) if groups is None else (n, groups)
    x, codes = torch.randn(m, k, generator=rng).half(), torch.randint(-8, 8, (n, k), generator=rng, dtype=torch.int8)
    scale, zero = torch.rand(shape, generator=rng) * 0.1 + 0.01, torch.randint(-8, 8, shape, generator=rng, dtype=torch.int8)
    return x, codes, scale, zero, torch.randn(n, generator=rng)


def assert_close(got: Tensor, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None) -> None:
    """Against float64, in units of the float32 sum's own rounding."""
    weight = reference.dequantize(codes, scale, zero, torch.float64)
    want = x.double() @ weight.T + (0 if bias is None else bias.double())
    room = (x.double().abs() @ weight.abs().T + want.abs()) * x.shape[1] ** 0.5 * 2**-23 + want.abs() * torch.finfo(got.dtype).eps
    assert ((got.double() - want).abs() <= room).all()


def test_words_hold_every_code() -> None:
    codes = draw(1, 7, 200, None)[1]
    state = kernels.prepare(codes, torch.ones(7), torch.zeros(7, dtype=torch.int32))
    assert state.words.shape == (7, 64)
    assert torch.equal(kernels.codes_of(state), codes)


def test_golden_words() -> None:
    """Codes -8, 7, 0, -1 at 0, 16, 32, 48 are nibbles 0, 15, 8, 7 from the lowest up; the other codes are 0, nibble 8."""
    codes = torch.zeros((1, 64), dtype=torch.int8)
    codes[0, [0, 16, 32, 48]] = torch.tensor([-8, 7, 0, -1], dtype=torch.int8)
    words = kernels.prepare(codes, torch.ones(1), torch.zeros(1, dtype=torch.int32)).words
    assert words[0, 0].item() & 0xFFFF == 0x78F0
    assert {word & 0xFFFF for word in words[0, 1:].tolist()} == {0x8888}


@triton.jit
def planes(words_ptr, zero_ptr, out_ptr, KIND: tl.constexpr):
    j, n = tl.arange(0, 16), tl.arange(0, 16)
    words = tl.load(words_ptr + n[:, None] * 16 + j[None, :])
    offset = tl.load(zero_ptr + n).to(tl.float32) + 8.0
    for plane in tl.static_range(4):
        values = kernels._plane(words, offset, 4 * plane, KIND).to(tl.float32)
        tl.store(out_ptr + n[:, None] * 64 + plane * 16 + j[None, :], values)


@pytest.mark.parametrize("kind", ["fp16", "plain"])
def test_every_nibble_minus_every_zero_point_is_exact(kind: str) -> None:
    codes = (torch.arange(64) % 16 - 8).to(torch.int8).repeat(16, 1)
    zero = (torch.arange(16) - 8).to(torch.int8)
    out = torch.empty(16, 64)
    planes[(1,)](kernels.prepare(codes, torch.ones(16), zero).words, zero, out, KIND=kind)
    assert torch.equal(out, codes.float() - zero.float()[:, None])


def test_the_bits_of_bfloat16_and_its_subtraction_are_exact() -> None:
    """The interpreter adds bfloat16 as integers, so the identity that the kernel uses is checked with torch's arithmetic."""
    nibble, zero = torch.arange(16, dtype=torch.int16), torch.arange(-8, 8)
    got = (nibble | 0x4300).view(torch.bfloat16) - (zero.float() + 8.0 + 128.0).bfloat16()[:, None]
    assert torch.equal(got.float(), (nibble - 8).float() - zero.float()[:, None])


def test_random_shapes() -> None:
    rng = random.Random(3)
    for i in range(60):
        m, n, k = rng.randint(1, 40), rng.randint(1, 90), rng.choice([1, 7, 16, 63, 64, 80, 128, 192, 200, 320])
        x, codes, scale, zero, bias = draw(m, n, k, None, i)
        state = kernels.prepare(codes, scale, zero)
        assert_close(kernels.linear(x, bias, state, Epilogue(out_dtype=torch.float32)), x, codes, scale, zero, bias)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("m", [1, 16, 33, 130])
def test_groups(size: int, m: int) -> None:
    x, codes, scale, zero, bias = draw(m, 70, 256, 256 // size)
    state = kernels.prepare(codes, scale, zero)
    assert_close(kernels.linear(x, bias, state, Epilogue(out_dtype=torch.float16)), x, codes, scale, zero, bias)


@pytest.mark.parametrize("tile", WEIGHT_ONLY_TILES, ids=str)
def test_every_shipped_tile(tile: Tile) -> None:
    for groups in (None, 2):
        x, codes, scale, zero, _ = draw(tile.bm + 1, tile.bn + 3, 256, groups)
        state = kernels.prepare(codes, scale, zero)
        assert_close(kernels.linear(x, None, state, Epilogue(out_dtype=torch.float32), tile=tile), x, codes, scale, zero, None)


@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("m", [1, 17, 40])
def test_eight_bits(m: int, groups: int | None) -> None:
    rng = torch.Generator().manual_seed(m)
    for k in (256,) if groups else (7, 80, 320):
        x, _, scale, _, bias = draw(m, 70, k, groups)
        codes = torch.randint(-128, 128, (70, k), generator=rng, dtype=torch.int8)
        zero = torch.randint(-128, 128, scale.shape, generator=rng, dtype=torch.int8)
        state = kernels.prepare(codes, scale, zero, bits=8)
        assert torch.equal(kernels.codes_of(state), codes)
        assert_close(kernels.linear(x, bias, state, Epilogue(out_dtype=torch.float32)), x, codes, scale, zero, bias)


def test_the_public_call_is_the_same_at_any_batch_position() -> None:
    x, codes, scale, zero, bias = draw(6, 40, 128, 2)
    layer = op.prepare(codes, scale, zero, bias, backend="triton")
    residual = torch.randn(6, 40).half()
    whole = op.linear(x.reshape(2, 3, 128), layer, activation="silu", residual=residual.reshape(2, 3, 40))
    assert (whole.shape, whole.dtype) == ((2, 3, 40), torch.float16)
    plain = op.linear(x, op.prepare(codes, scale, zero, bias, backend="reference"), activation="silu", residual=residual)
    assert torch.allclose(whole.reshape(6, 40).float(), plain.float(), rtol=2e-3, atol=2e-3)
    for i in range(6):
        alone = op.linear(x[i : i + 1], layer, activation="silu", residual=residual[i : i + 1])
        assert torch.equal(alone, whole.reshape(6, 40)[i : i + 1])
    assert op.linear(x[:0], layer).shape == (0, 40)
    assert_close(op.linear(x.float(), layer), x, codes, scale, zero, bias)
