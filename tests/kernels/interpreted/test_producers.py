"""The Triton producers: codes against float64 values before rounding, over odd shapes, tables, gains and both kinds of scale."""

from __future__ import annotations

import math

import pytest
import torch
from producers import check_codes, check_rows, gelu, group_norm, layer_norm
from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.gelu_quantize.op import gelu_quantize, gelu_quantize_per_token
from qdm_kernels.gemm import tiles
from qdm_kernels.group_norm_quantize.op import group_norm_quantize
from qdm_kernels.layer_norm_quantize import triton as kernel
from qdm_kernels.layer_norm_quantize.op import layer_norm_quantize, layer_norm_quantize_per_token

SCALES, ZEROS = torch.tensor([0.031, 0.02, 0.3]), torch.tensor([3, -100, 0], dtype=torch.int8)
STEP = torch.tensor([1], dtype=torch.int32)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def normal(*shape: int, seed: int = 0, scale: float = 1.0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale + mean


def test_the_triton_backend_is_what_runs_here() -> None:
    for op in ("layer_norm_quantize", "group_norm_quantize", "gelu_quantize"):
        assert backend.choose(op) == "triton"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 72), (1, 3, 1), (3, 320), (2, 3, 2, 129), (1, 2, 2500), (0, 4, 16)], ids=str)
def test_layer_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = shape[-1]
    x, w, b = normal(*shape, mean=2.0).to(dtype), normal(k, seed=1), normal(k, seed=2)
    m, shift = normal(shape[0], k, seed=3, scale=0.3).to(dtype), normal(shape[0], k, seed=4).to(dtype)
    for modulation in (None, (m, shift)):
        exact = layer_norm(x, w, b, modulation)
        codes = layer_norm_quantize(x, SCALES[:1], ZEROS[:1], weight=w, bias=b, modulation=modulation)
        check_codes(codes, exact, SCALES[0], 3)
        check_rows(*layer_norm_quantize_per_token(x, weight=w, bias=b, modulation=modulation), exact)


def test_layer_norm_without_affine_takes_rows_of_tables_and_gains() -> None:
    x, gains = normal(2, 5, 72), 2 ** normal(3, 72, seed=1)
    codes = layer_norm_quantize(x, SCALES, ZEROS, gain=gains, step=STEP, eps=1e-6)
    check_codes(codes, layer_norm(x, gain=gains[1], eps=1e-6), SCALES[1], -100)
    codes, scale = layer_norm_quantize_per_token(x, gain=gains, step=STEP)
    check_rows(codes, scale, layer_norm(x, gain=gains[1]))
    check_codes(layer_norm_quantize(x, SCALES[:1], ZEROS, gain=gains[2], step=STEP), layer_norm(x, gain=gains[2]), SCALES[0], -100)


@pytest.mark.parametrize("shape", [(1, 300, 72), (3, 21, 320), (2, 11, 1280), (2, 9, 768), (7, 40), (5, 6200)], ids=str)
def test_layer_norm_of_many_rows_per_program(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of one multiprocessor: each program takes several rows, of one sample; the bits are those of one row per program."""
    k = shape[-1]
    x, w, b = normal(*shape, mean=2.0), normal(k, seed=1), normal(k, seed=2)
    for modulation in (None, (normal(shape[0], k, seed=3, scale=0.3), normal(shape[0], k, seed=4))):
        keys = {"weight": w, "bias": b, "modulation": modulation}
        found = []
        for count in (132, 1):
            monkeypatch.setattr(tiles, "processors", lambda device, count=count: (90, count))
            kernel._ready.clear()
            found.append((layer_norm_quantize(x, SCALES[:1], ZEROS[:1], **keys), *layer_norm_quantize_per_token(x, **keys)))
        kernel._ready.clear()
        check_codes(found[1][0], layer_norm(x, w, b, modulation), SCALES[0], 3)
        assert all(torch.equal(one, many) for one, many in zip(*found, strict=True))


@pytest.mark.parametrize("present", range(8))
def test_layer_norm_with_some_of_weight_bias_and_gain(present: int) -> None:
    x, w, b, gain = normal(2, 5, 72), normal(72, seed=1), normal(72, seed=2), normal(72, seed=3)
    w, b, gain = (one if present >> i & 1 else None for i, one in enumerate((w, b, gain)))
    for modulation in (None, (normal(2, 72, seed=4), normal(2, 72, seed=5))):
        codes = layer_norm_quantize(x, SCALES[:1], ZEROS[:1], weight=w, bias=b, gain=gain, modulation=modulation)
        check_codes(codes, layer_norm(x, w, b, modulation, gain), SCALES[0], 3)


def test_layer_norm_of_rows_with_nan() -> None:
    x = normal(3, 100)
    x[1, 99] = math.nan
    assert layer_norm_quantize(x, SCALES[:1], ZEROS[:1])[1].eq(3).all()
    codes, scale = layer_norm_quantize_per_token(x)
    assert scale.isnan().flatten().tolist() == [False, True, False]
    assert codes[1].eq(0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "groups"),
    [((2, 20, 5, 7), 4), ((1, 32, 1, 1), 32), ((1, 48, 1, 9), 3), ((1, 40, 17, 16), 4), ((1, 12, 20, 27), 2), ((0, 8, 4, 4), 2)],
    ids=str,
)
def test_group_norm(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    c = shape[1]
    x, w, b = normal(*shape, mean=1.5).to(dtype), normal(c, seed=1), normal(c, seed=2)
    for activation in ("silu", "none"):
        codes = group_norm_quantize(x, groups, SCALES[:1], ZEROS[:1], weight=w, bias=b, activation=activation)
        exact = group_norm(x, groups, w, b, activation=activation)
        check_codes(codes, exact, SCALES[0], 3)
        assert codes.numel() == 0 or codes.is_contiguous(memory_format=torch.channels_last)


def test_group_norm_takes_rows_of_tables_and_gains_and_any_layout() -> None:
    x, gains = normal(2, 20, 5, 7), 2 ** normal(3, 20, seed=1)
    exact = group_norm(x, 4, gain=gains[1])
    for image in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)):
        check_codes(group_norm_quantize(image, 4, SCALES, ZEROS, gain=gains, step=STEP), exact, SCALES[1], -100)


def test_group_norm_with_a_large_mean_loses_nothing() -> None:
    """A sum of squares in float32 would: 1e4 ** 2 swallows a variance of 1."""
    x = normal(1, 8, 40, 30, mean=1e4)
    check_codes(group_norm_quantize(x, 2, SCALES[:1], ZEROS[:1]), group_norm(x, 2), SCALES[0], 3, slack=0.15)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shape", [(2, 5, 72), (3, 1), (1, 2, 3000), (0, 4, 16)], ids=str)
def test_gelu(shape: tuple[int, ...], gated: bool, approximate: str, dtype: torch.dtype) -> None:
    x = normal(*shape[:-1], shape[-1] * (2 if gated else 1), scale=2.0).to(dtype)
    exact = gelu(x, gated, approximate)
    check_codes(gelu_quantize(x, SCALES[:1], ZEROS[:1], gated=gated, approximate=approximate), exact, SCALES[0], 3)
    check_rows(*gelu_quantize_per_token(x, gated=gated, approximate=approximate), exact)


def test_gelu_takes_rows_of_tables_and_gains() -> None:
    x, gains = normal(4, 80), 2 ** normal(3, 40, seed=1)
    check_codes(gelu_quantize(x, SCALES, ZEROS, gated=True, gain=gains, step=STEP), gelu(x, True, gain=gains[1]), SCALES[1], -100)
    check_rows(*gelu_quantize_per_token(x, gated=True, gain=gains, step=STEP), gelu(x, True, gain=gains[1]))


@pytest.mark.parametrize("bits", [2, 4])
def test_fewer_bits_saturate_at_their_own_ends(bits: int) -> None:
    x = normal(3, 64, scale=3.0)
    for codes in (layer_norm_quantize(x, SCALES[2:], ZEROS[2:], bits=bits), gelu_quantize(x, SCALES[2:], ZEROS[2:], bits=bits)):
        assert int(codes.max()) == (1 << bits - 1) - 1
    assert int(layer_norm_quantize(x, SCALES[2:], ZEROS[2:], bits=bits).min()) == -(1 << bits - 1)


def test_rows_of_zeros_infinities_and_nan() -> None:
    x = torch.zeros(3, 64)
    x[1, 3], x[2, 5] = math.inf, math.nan
    codes, scale = gelu_quantize_per_token(x)
    assert codes[0].eq(0).all()
    assert scale[0] == 1
    assert scale[1].isinf()
    assert scale[2].isnan()
    assert gelu_quantize(x, SCALES[:1], ZEROS[:1])[1, 3] == 127


def test_rows_too_long_for_registers_go_to_another_backend() -> None:
    x = normal(1, 2, 16385)
    check_rows(*layer_norm_quantize_per_token(x), layer_norm(x))
    check_rows(*gelu_quantize_per_token(x), gelu(x))
