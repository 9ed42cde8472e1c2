"""The Triton quantizers give the reference's codes: ties, saturation, tables, rows, memory formats."""

from __future__ import annotations

import pytest
import torch

from qdm_kernels.quantize import reference, triton
from qdm_kernels.quantize.op import quantize, quantize_per_token

SCALES = torch.tensor([0.0317, 0.25, 3.0])
ZEROS = torch.tensor([0, -3, 127], dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_static(bits: int, dtype: torch.dtype) -> None:
    x = (torch.randn(5, 1009, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    zero = torch.tensor(1, dtype=torch.int32)
    assert torch.equal(triton.quantize(x, SCALES[:1], zero, bits, None), reference.quantize(x.float(), SCALES[0], zero, bits))


def test_ties_and_saturation() -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30, -1e30, float("inf"), float("-inf")]) * 0.25
    for zero in ZEROS:
        got = triton.quantize(x, SCALES[1:2], zero, 8, None)
        assert torch.equal(got, reference.quantize(x, SCALES[1], zero, 8))
        assert got[:6].tolist() == torch.tensor([-2, -2, 0, 0, 2, 2]).add(zero).clamp(-128, 127).tolist()


@pytest.mark.parametrize("scale", [0.0, 1e-45, 0.5, float("inf")])
def test_what_is_not_finite_saturates_or_becomes_the_code_of_zero(scale: float) -> None:
    x, s = torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0, 1.0, -1.0]), torch.tensor([scale])
    for zero in ZEROS:
        got = triton.quantize(x, s, zero, 8, None)
        assert torch.equal(got, reference.quantize(x, s, zero, 8))
        assert got[0].item() == int(zero)


def test_every_row_of_a_table() -> None:
    x = torch.randn(70, 77)
    for i in range(3):
        step = torch.tensor([i], dtype=torch.int32)
        assert torch.equal(quantize(x, SCALES, ZEROS, 8, step), reference.quantize(x, SCALES[i], ZEROS[i], 8))
        assert torch.equal(quantize(x, SCALES, ZEROS[:1], 8, step), reference.quantize(x, SCALES[i], ZEROS[0], 8))


def test_memory_format_is_kept_and_views_are_right() -> None:
    x = torch.randn(2, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    got = quantize(x, SCALES[0], ZEROS[1], 8)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(got, reference.quantize(x, SCALES[0], ZEROS[1], 8))
    view = torch.randn(9, 20)[1:, 3:17]
    assert torch.equal(quantize(view, SCALES[0], ZEROS[1], 8), reference.quantize(view, SCALES[0], ZEROS[1], 8))
    assert quantize(x[:0], SCALES[0], ZEROS[0], 8).shape == (0, 6, 5, 3)


def test_scales_per_channel_take_the_plain_way() -> None:
    x, scale = torch.randn(4, 3, 2), torch.rand(3, 1)
    zero = torch.zeros((), dtype=torch.int32)
    assert torch.equal(quantize(x, scale, zero, 8), reference.quantize(x, scale, zero, 8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("k", [1, 7, 64, 1153, 9000])
def test_per_token(bits: int, k: int) -> None:
    x = torch.randn(2, 3, k, generator=torch.Generator().manual_seed(k)).half()
    x[0, 1] = 0
    codes, scale = quantize_per_token(x, bits)
    want_codes, want_scale = reference.quantize_per_token(x, bits)
    assert torch.equal(codes, want_codes)
    assert torch.equal(scale, want_scale)


def test_a_row_with_nan_shows_it_in_its_scale() -> None:
    x = torch.ones(3, 8)
    x[1, 4] = float("nan")
    _, scale = quantize_per_token(x, 8)
    assert scale.flatten().isnan().tolist() == [False, True, False]
    assert reference.quantize_per_token(x, 8)[1].flatten().isnan().tolist() == [False, True, False]
