"""Rounding of activations against float64, ties and saturation included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdm_kernels.quantize import cpu, reference
from qdm_kernels.quantize.op import quantize, quantize_per_token

BACKENDS = pytest.mark.parametrize("kernel", [cpu.quantize, reference.quantize], ids=["cpu", "reference"])


def truth(x: Tensor, scale: float, z: int, bits: int) -> Tensor:
    """The contract in float64 on the float32 product x * (1 / scale): the product is part of the contract, the rest must add no error."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    product = x * (torch.ones(()) / torch.tensor(scale))
    return torch.round(product.double().clamp(low - z, high - z)).add(z).to(torch.int8)


@BACKENDS
@pytest.mark.parametrize("bits", [2, 4, 6, 8])
@pytest.mark.parametrize("z", [0, 1, -2])
def test_matches_float64(kernel, bits: int, z: int) -> None:
    x = torch.randn(4099, generator=torch.Generator().manual_seed(0)) * 3
    got = kernel(x, torch.tensor(0.0317), torch.tensor(z), bits)
    assert got.dtype == torch.int8
    assert torch.equal(got, truth(x, 0.0317, z, bits))


@BACKENDS
@pytest.mark.parametrize("z", [0, 1, -3, 127, -128])
def test_ties_go_to_the_even_quotient_whatever_the_zero_point(kernel, z: int) -> None:
    x = torch.tensor([-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]) * 0.25
    want = torch.tensor([-2, -2, 0, 0, 2, 2]).add(z).clamp(-128, 127)
    assert kernel(x, torch.tensor(0.25), torch.tensor(z), 8).tolist() == want.tolist()


@BACKENDS
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("z", [0, 5, -7])
def test_saturates(kernel, bits: int, z: int) -> None:
    x = torch.tensor([1e30, -1e30, float("inf"), float("-inf"), 3e38])
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    assert kernel(x, torch.tensor(0.1), torch.tensor(z), bits).tolist() == [high, low, high, low, high]


@BACKENDS
@pytest.mark.parametrize("z", [0, 5, -8, 7])
@pytest.mark.parametrize("shape", [(), (1,), (3, 1)], ids=["number", "one", "rows"])
def test_nan_is_real_zero(kernel, z: int, shape: tuple[int, ...]) -> None:
    x, zero_point = torch.full((3, 5), float("nan")), torch.full(shape, z)
    assert kernel(x, torch.full(shape, 0.1), zero_point, 4).eq(z).all()


@BACKENDS
def test_a_scale_of_zero_keeps_zeros_and_saturates_the_rest(kernel) -> None:
    x = torch.tensor([0.0, -0.0, 1e-30, -2.0])
    assert kernel(x, torch.tensor(0.0), torch.tensor(3), 8).tolist() == [3, 3, 127, -128]


@BACKENDS
def test_empty_and_strided_activations(kernel) -> None:
    assert kernel(torch.empty(0, 7), torch.tensor(0.1), torch.tensor(1), 8).shape == (0, 7)
    x = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    got = kernel(x.T[::2], torch.tensor(0.02), torch.tensor(1), 8)
    assert torch.equal(got, truth(x.T[::2], 0.02, 1, 8))


@given(st.floats(-1e4, 1e4, width=32), st.floats(2**-10, 10, width=32), st.integers(-8, 7))
def test_backends_agree(value: float, scale: float, z: int) -> None:
    args = torch.tensor([value]), torch.tensor([scale]), torch.tensor([z]), 4
    assert torch.equal(cpu.quantize(*args), reference.quantize(*args))


def test_multiplies_by_the_reciprocal() -> None:
    """Division rounds some quotients across a tie; the contract multiplies."""
    scale = 0.0317
    x = (torch.arange(-128, 127) + 0.5) * scale
    got = quantize(x, torch.tensor(scale), torch.tensor(0), 8)
    assert torch.equal(got, truth(x, scale, 0, 8))
    assert not torch.equal(got, torch.round((x / scale).clamp(-128, 127)).to(torch.int8))


def test_broadcasts_per_channel_and_keeps_channels_last() -> None:
    x = torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    scale, z = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1), torch.tensor([0, 4, -4]).view(3, 1, 1)
    got = quantize(x, scale, z, 8)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for c in range(3):
        assert torch.equal(got[:, c], quantize(x[:, c], scale[c].view(1), z[c].view(1), 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_computes_in_float32(dtype: torch.dtype) -> None:
    x = torch.randn(1000).to(dtype)
    assert torch.equal(quantize(x, torch.tensor(0.01), torch.tensor(3), 8), quantize(x.float(), torch.tensor(0.01), torch.tensor(3), 8))


def test_leaves_the_input_alone() -> None:
    x = torch.randn(10)
    kept = x.clone()
    quantize(x, torch.tensor(0.01), torch.tensor(3), 8)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("bits", [4, 8])
def test_per_token(bits: int) -> None:
    x = torch.randn(2, 5, 33)
    x[0, 1] = 0
    codes, scale = quantize_per_token(x, bits)
    top = (1 << bits - 1) - 1
    assert scale.shape == (2, 5, 1)
    assert (codes[0, 1] == 0).all()
    assert scale[0, 1].item() == 1
    moving = torch.arange(10) != 1
    assert (codes.flatten(0, 1).abs().amax(-1)[moving] == top).all()
    assert (x - codes * scale).abs().max() <= scale.max() / 2 * 1.0001


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 1}, "2..8"),
        ({"bits": 9}, "2..8"),
        ({"zero_point": torch.tensor(0.0)}, "integer tensor"),
        ({"x": torch.ones(3).int()}, "float"),
    ],
)
def test_errors(change: dict, message: str) -> None:
    args = {"x": torch.ones(3), "scale": torch.tensor(1.0), "zero_point": torch.tensor(0), "bits": 8} | change
    with pytest.raises(ValueError, match=message):
        quantize(**args)
