"""Compiled attention against float64, with both kinds of products where the machine has them."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from qdm_kernels.attention import op
from qdm_kernels.attention import reference as attention_reference
from qdm_kernels.native import attention as native
from qdm_kernels.native.attention import Products
from qdm_kernels.native.producers import Grid
from qdm_kernels.quantize import reference

KINDS = [kind for kind in native.LIBRARIES if native._library(kind) is not None]
ALLOWED = {Products.BYTES: 0.02}  # relative error against float64, unit variance
FIXED = [kind for kind in (Products.SHORTS, Products.NARROW) if kind in KINDS]
needs_bytes = pytest.mark.skipif(Products.BYTES not in KINDS, reason="no AVX512-VNNI here")
needs_fixed_point = pytest.mark.skipif(not FIXED, reason="no AVX512-VNNI, nor AVX2 alone")
pytestmark = pytest.mark.skipif(not KINDS, reason="no compiler or no AVX2 here")
SHAPES = [
    (1, 1, 1, 1, 8),
    (2, 3, 65, 130, 40),
    (1, 2, 300, 77, 64),
    (1, 2, 129, 257, 160),
    (1, 1, 70, 1, 7),
    (1, 2, 33, 31, 256),
    (1, 3, 64, 97, 80),
]


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name.lower())
def kind(request: pytest.FixtureRequest) -> Products:
    return request.param


@pytest.fixture(params=FIXED, ids=lambda kind: kind.name.lower())
def fixed(request: pytest.FixtureRequest) -> Products:
    return request.param


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def drawn(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as processors pass them: heads of one row lie beside each other."""
    b, h, length, keys, width = shape
    return tuple(draw(b, n, h, width, seed=seed, dtype=dtype).transpose(1, 2) for seed, n in enumerate((length, keys, keys)))  # type: ignore[return-value]


def error(got: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> float:
    want = attention_reference.attention(q.double(), k.double(), v.double(), scale)
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_close_to_float64(shape, dtype, kind, threads) -> None:
    q, k, v = drawn(shape, dtype)
    got = native.attention(q, k, v, shape[-1] ** -0.5, kind)
    assert got.dtype == dtype
    assert got.transpose(1, 2).is_contiguous()
    assert error(got, q, k, v, shape[-1] ** -0.5) <= ALLOWED.get(kind, 0.005)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_views_are_read_where_they_lie(dtype, kind) -> None:
    """Neighbours that belong to nobody are NaN; rows of another order, and a width that is not dense."""
    around = torch.full((3, 70, 4, 3, 48), torch.nan, dtype=dtype)
    q, k, v = around[1:, 2:67, 1:3, 0, :40], around[1:, 5:, 1:3, 1, 8:], around[1:, 5:, 1:3, 2, 4:44]
    for seed, part in enumerate((q, k, v)):
        part.copy_(draw(*part.shape, seed=seed))
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    assert error(native.attention(q, k, v, 0.2, kind), q, k, v, 0.2) <= ALLOWED.get(kind, 0.005)
    apart = torch.stack([v, v], -1)[..., 0]
    assert torch.equal(native.attention(q, k, apart, 0.2, kind), native.attention(q, k, v, 0.2, kind))


@pytest.mark.parametrize(("q_len", "k_len", "width"), [(1, 1, 1), (33, 65, 17), (65, 33, 31), (64, 64, 32), (31, 95, 47)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_written_around_the_output(q_len, k_len, width, dtype, kind, monkeypatch) -> None:
    q, k, v = drawn((2, 2, q_len, k_len, width), dtype)
    around: list[Tensor] = []

    def inside(shape, dtype):
        """An output between two margins of sevens."""
        count = torch.Size(shape).numel()
        around.append(torch.full((count + 128,), 7.0, dtype=dtype))
        return around[-1][64 : 64 + count].view(shape)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", inside)
        got = native.attention(q, k, v, 0.3, kind)
    assert error(got, q, k, v, 0.3) <= ALLOWED.get(kind, 0.005)
    assert (around[0][:64] == 7).all()
    assert (around[0][-64:] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [8.0, 64.0])
def test_large_scores_do_not_overflow(size, dtype, kind) -> None:
    """Scores of up to 100,000. Inputs that bfloat16 holds, keys without a common part: no score is rounded, whatever its size."""
    q, k, v = (draw(2, 2, n, 40, seed=seed).bfloat16().to(dtype) for seed, n in enumerate((150, 60, 120)))
    q, k = q * size, torch.cat([k, -k], 2) * size
    got = native.attention(q, k, v, 40**-0.5, kind)
    assert torch.isfinite(got).all()
    assert error(got, q, k, v, 40**-0.5) <= 0.005


def test_a_maximum_that_grows_late_counts(kind) -> None:
    """The last key takes all: what was summed before it must shrink to nothing."""
    q, k, v = (draw(1, 1, 200, 32, seed=seed) for seed in range(3))
    k[:, :, -1] = 50 * q[:, :, 7]
    got = native.attention(q, k, v, 1.0, kind)
    torch.testing.assert_close(got[0, 0, 7], v[0, 0, -1], rtol=0.01, atol=0.01)
    assert error(got, q, k.bfloat16().float(), v, 1.0) <= 0.1


def test_a_common_part_of_the_keys_costs_no_precision(kind) -> None:
    q, k, v = drawn((1, 2, 130, 130, 40))
    assert error(native.attention(q, k + 100, v, 40**-0.5, kind), q, k, v, 40**-0.5) <= ALLOWED.get(kind, 0.005)


def test_equal_keys_give_the_mean_value(kind) -> None:
    q, k, v = drawn((1, 2, 66, 99, 40))
    k = k[:, :, :1].expand_as(k)
    want = v.mean(2, keepdim=True).expand_as(q)
    torch.testing.assert_close(native.attention(q, k, v, 3.0, kind), want, rtol=0.01, atol=0.003)


@pytest.mark.parametrize("where", ["queries", "keys", "values"])
def test_nan_is_not_hidden(where, kind) -> None:
    q, k, v = (t.clone() for t in drawn((1, 1, 70, 70, 40)))
    {"queries": q, "keys": k, "values": v}[where][0, 0, 5, 3] = torch.nan
    got = native.attention(q, k, v, 0.2, kind)
    if where == "queries":
        assert got[0, 0, 5].isnan().all()
        assert torch.isfinite(got[0, 0, torch.arange(70) != 5]).all()
    else:
        assert got.isnan().any(3).all()


def test_runs_and_threads_agree_to_the_bit(kind) -> None:
    q, k, v = drawn((2, 3, 200, 300, 40))
    before = torch.get_num_threads()
    got = []
    try:
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            got.append(native.attention(q, k, v, 0.15, kind))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, got[0]) for one in got)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("shape", "zero", "code_dtype"), [((2, 3, 65, 130, 40), 5, torch.int8), ((1, 2, 33, 31, 72), -40, torch.uint8)], ids=str
)
@pytest.mark.parametrize("size", [1.0, 100.0], ids=["bounded", "large scores"])
@pytest.mark.parametrize("with_gain", [False, True], ids=["", "gain"])
def test_codes_are_those_of_the_output(shape, zero, code_dtype, size, with_gain, dtype, kind) -> None:
    """In one pass what takes two: a code may be the next one where an output, not rounded to bfloat16 in between, is near a tie."""
    q, k, v = drawn(shape, dtype)
    q, k = q * size, k * size
    gain = torch.rand(shape[1] * shape[4]) + 0.5 if with_gain else None
    to = native.Codes(Grid(50.0, zero), gain, code_dtype)
    got = native.attention(q, k, v, 0.2, kind, to).transpose(1, 2).flatten(2)
    assert got.dtype == code_dtype
    values = native.attention(q, k, v, 0.2, kind).transpose(1, 2).flatten(2).float()
    want = reference.quantize(values if gain is None else values * gain, torch.tensor(0.02), torch.tensor(zero), 8).int()
    off = got.int() - (128 if code_dtype == torch.uint8 else 0) - want
    assert off.abs().max() <= 1
    assert (off != 0).float().mean() < (0.15 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("code_dtype", [torch.int8, torch.uint8], ids=str)
def test_codes_where_torchs_kernel_serves(code_dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """AVX2 alone, and norms that do not bound the scores."""
    monkeypatch.setattr(native, "_library", lambda kind: None)
    q, k, v = drawn((2, 3, 17, 30, 40))
    gain = torch.rand(120) + 0.5
    got = native._in_float32(q, k, v, 0.2, native.Codes(Grid(50.0, 7), gain, code_dtype)).transpose(1, 2).flatten(2)
    values = native._in_float32(q, k, v, 0.2, None).transpose(1, 2).flatten(2)
    want = reference.quantize(values * gain, torch.tensor(0.02), torch.tensor(7), 8).int()
    assert torch.equal(got.int() - (128 if code_dtype == torch.uint8 else 0), want)


def test_torchs_own_products_survive_it(kind) -> None:
    """oneDNN keeps a tile configuration of its own in the same threads."""
    a, b = draw(256, 256).bfloat16(), draw(256, 256, seed=1).bfloat16()
    want = a @ b
    native.attention(*drawn((1, 2, 64, 64, 40)), 0.2, kind)
    assert torch.equal(a @ b, want)


@pytest.mark.parametrize("shape", [(1, 2, 0, 5, 8), (0, 2, 3, 5, 8)], ids=str)
def test_no_queries_no_output(shape, kind) -> None:
    q, k, v = drawn(shape)
    assert native.attention(q, k, v, 1.0, kind).shape == q.shape


@pytest.mark.skipif(Products.FLOATS not in KINDS, reason="no AVX512 here")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_float32_is_closest(shape) -> None:
    q, k, v = drawn(shape)
    assert error(native.attention(q, k, v, shape[-1] ** -0.5, Products.FLOATS), q, k, v, shape[-1] ** -0.5) <= 2e-6


@needs_fixed_point
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 2, 100, 160, 512), (1, 1, 17, 83, 1024), (1, 1, 300, 401, 40)], ids=str)
def test_fixed_point_is_far_closer_than_bfloat16(shape, dtype, fixed) -> None:
    q, k, v = drawn(shape, dtype)
    scale = shape[-1] ** -0.5
    rounding = 0.002 if dtype == torch.bfloat16 else 0.0  # of the output
    assert error(native.attention(q, k, v, scale, fixed), q, k, v, scale) <= 6e-4 + rounding


@needs_fixed_point
def test_sums_of_fixed_point_do_not_overflow(fixed) -> None:
    """All weights and all values of a block are the largest there are; so are all products of a query with its own direction."""
    q, k = torch.ones(1, 1, 40, 1024), torch.ones(1, 1, 163, 1024)
    q[..., 1:], k[..., 1:] = 0.5, 0.5
    k[:, :, ::2] *= -1
    for scale in (1e-6, 0.05):
        v = torch.full_like(k, -7.0)
        assert error(native.attention(q, k, v, scale, fixed), q, k, v, scale) <= 6e-4


@pytest.mark.parametrize("with_codes", [False, True], ids=["", "codes"])
def test_an_image_does_not_depend_on_those_beside_it(kind, with_codes) -> None:
    """The scores of one of three are too large for some of the products."""
    q, k, v = drawn((3, 2, 70, 140, 40))
    q[1], k[1] = 8 * q[1], 8 * k[1]
    to = native.Codes(Grid(50.0, 3)) if with_codes else None
    got = native.attention(q, k, v, 0.2, kind, to)
    assert got.transpose(1, 2).is_contiguous()
    for i in range(3):
        assert torch.equal(got[i : i + 1], native.attention(*(t[i : i + 1] for t in (q, k, v)), 0.2, kind, to)), i


@needs_fixed_point
def test_where_scores_may_be_large_float32_serves(fixed) -> None:
    """Norms of a few keys that are 30 times larger would leave too little of the others."""
    q, k, v = drawn((1, 2, 70, 90, 40))
    k = torch.cat([30 * k[:, :, :45], -30 * k[:, :, :45]], 2)
    got = native.attention(q, k, v, 0.4, fixed)
    assert torch.equal(got, native._in_float32(q, k, v, 0.4, None))
    assert got.transpose(1, 2).is_contiguous()
    assert error(got, q, k, v, 0.4) <= 1e-5
    outlier = v.clone()
    outlier[0, 0, 3] *= 1e4  # a value that others of its block and column do not survive weighs as much as they do not
    assert error(native.attention(q, k / 30, outlier, 0.16, fixed), q, k / 30, outlier, 0.16) <= 6e-4


@needs_bytes
def test_sums_of_bytes_do_not_overflow() -> None:
    """All codes are the largest there are: of queries and keys as wide as they get, of weights, and of values."""
    q, k = torch.ones(1, 1, 40, 1024), torch.ones(1, 1, 163, 1024)
    k[:, :, ::2] *= -1
    v = 7 * k
    for scale in (1e-6, 1e-3):
        got = native.attention(q, k, v, scale, Products.BYTES)
        assert not torch.equal(got, native.attention(q, k, v, scale))
        assert (got - attention_reference.attention(q.double(), k.double(), v.double(), scale)).abs().max() <= 0.02


@needs_bytes
def test_small_weights_beside_a_large_one_keep_their_sum() -> None:
    """One key weighs 600 times as much as each of the others: to the nearest 255th of it, those would weigh nothing."""
    q, k, v = torch.ones(1, 1, 64, 40), draw(1, 1, 512, 40, seed=1) * 0.01, draw(1, 1, 512, 40, seed=2) * 0.1 + 1
    k[:, :, 5] += math.log(600) / 40
    v[:, :, 5] = -1
    got = native.attention(q, k, v, 1.0, Products.BYTES)
    assert not torch.equal(got, native.attention(q, k, v, 1.0))
    want = attention_reference.attention(q.double(), k.double(), v.double(), 1.0)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=0.015)  # the 127 others of its group make up 0.2


@needs_bytes
def test_what_a_large_weight_leaves_is_not_rounded_away() -> None:
    """One key with nine tenths of all weight and a value of zero: outputs are what the others make of theirs."""
    q, k, v = drawn((1, 2, 256, 1000, 40))
    towards = torch.nn.functional.normalize(draw(40, seed=3), dim=0)
    q, k[:, :, 700], v[:, :, 700] = q + 6 * towards, 12 * towards, 0.0
    weights = torch.softmax(q @ k.transpose(2, 3) * 40**-0.5, -1)
    assert 0.85 < weights[..., 700].mean() < 0.95
    got = native.attention(q, k, v, 40**-0.5, Products.BYTES)
    assert not torch.equal(got, native.attention(q, k, v, 40**-0.5))
    assert error(got, q, k, v, 40**-0.5) <= 0.03


@needs_bytes
@pytest.mark.parametrize("where", ["keys", "queries", "values", "norms"])
def test_where_bytes_are_too_coarse_others_serve(where) -> None:
    """A feature, or a value, that is much larger than others decides what their codes are worth; long rows have large scores."""
    q, k, v = drawn((1, 2, 70, 300, 40))
    scale = 40**-0.5
    if where == "norms":
        q, k = (torch.ones(1, 2, n, 1024) for n in (70, 300))
        k[:, :, ::2] *= -1
        v, scale = torch.ones_like(k), 0.035
    assert not torch.equal(native.attention(q, k, v, scale, Products.BYTES), native.attention(q, k, v, scale))
    if where == "keys":
        k[0, 1, ::2, 3] = 40.0
    elif where == "queries":
        q[0, 1, ::2, 3] = 18.0
    elif where == "values":
        v[0, 1, ::100] *= 30
    else:
        scale = 0.045
    assert torch.equal(native.attention(q, k, v, scale, Products.BYTES), native.attention(q, k, v, scale))


@needs_bytes
def test_only_who_asks_gets_bytes() -> None:
    assert native.products() is not Products.BYTES
    q, k, v = drawn((1, 2, 1024, 1024, 40))
    exact = op.attention(q, k, v)
    assert error(exact, q, k, v, 40**-0.5) <= 0.005
    if op.bytes_pay(q, k):
        coarse = op.attention(q, k, v, eight_bit=True)
        assert 0.005 < error(coarse, q, k, v, 40**-0.5) <= 0.02
        assert torch.equal(coarse, native.attention(q, k, v, 40**-0.5, Products.BYTES))
    assert torch.equal(op.attention(q[:, :, :100], k, v, eight_bit=True), op.attention(q[:, :, :100], k, v))


def test_a_variable_keeps_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDM_ATTENTION_BITS", "16")
    q, k, v = drawn((1, 2, 1024, 1024, 40))
    assert not op.bytes_pay(q, k)
    assert torch.equal(op.attention(q, k, v, eight_bit=True), op.attention(q, k, v))


def test_what_it_does_not_read() -> None:
    x = draw(1, 1, 4, 8)
    assert native.takes(x, x, x, 1.0)
    assert not native.takes(x, x.bfloat16(), x, 1.0)
    assert not native.takes(x.double(), x.double(), x.double(), 1.0)
    assert not native.takes(x, x, x, -1.0)
    assert not native.takes(x, x[:, :, :0], x[:, :, :0], 1.0)
    wide = draw(1, 1, 1, native.WIDEST + 1)
    assert not native.takes(wide, wide, wide, 1.0)


def test_turned_off_torch_computes() -> None:
    code = (
        "import torch; from qdm_kernels.attention import op; from qdm_kernels.native.attention import products;"
        "x = torch.ones(1, 1, 20, 8); print(products().name, op.attention(x, x, x).mean().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"QDM_NATIVE": "0"}, capture_output=True, text=True)
    assert done.stdout.split() == ["NONE", "1.0"], done.stderr
