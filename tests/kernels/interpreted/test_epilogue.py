"""Device functions shared by the kernels: rounding and saturation bit for bit, activations and low-rank branch against float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from qdm_kernels.epilogue import triton as device

INF = math.inf


@triton.jit
def round_kernel(x, scale, zero, out, n, LOW: tl.constexpr, HIGH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, device.to_codes(v, tl.div_rn(1.0, tl.load(scale)), tl.load(zero), LOW, HIGH), mask=i < n)


@triton.jit
def tile_kernel(
    x, residual, out_scale, out_zero, step, out, M, N, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, TABLE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    at, mask = m[:, None] * N + n[None, :], (m < M)[:, None] & (n < N)[None, :]
    y = tl.load(x + at, mask=mask, other=0.0)
    device.store(y, out, residual, out_scale, out_zero, step, at, mask, ACTIVATION, RESIDUAL, TABLE, False)


def codes(x: torch.Tensor, scale: float, zero: int, bits: int) -> torch.Tensor:
    out = torch.empty(x.numel(), dtype=torch.int8)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    block = triton.next_power_of_2(x.numel())
    round_kernel[(1,)](x, torch.tensor([scale]), torch.tensor([zero], dtype=torch.int32), out, x.numel(), low, high, BLOCK=block)
    return out


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("zero", [0, 1, -2])
def test_rounding_equals_torch_on_ties_and_beyond_the_range(bits: int, zero: int) -> None:
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    halves = torch.arange(-300, 301) * 0.5
    x = torch.cat([halves, torch.nextafter(halves, torch.tensor(INF)), torch.nextafter(halves, torch.tensor(-INF)), torch.randn(200) * 60])
    want = torch.round(x.clamp(low - zero, high - zero)) + zero
    assert torch.equal(codes(x, 1.0, zero, bits).float(), want)
    scaled = x * torch.tensor(0.37).reciprocal()
    assert torch.equal(codes(x, 0.37, zero, bits).float(), torch.round(scaled.clamp(low - zero, high - zero)) + zero)


def test_infinities_saturate_nothing_wraps_and_nan_is_zero() -> None:
    x = torch.tensor([INF, -INF, 1e38, -1e38, 3.4e38, math.nan])
    assert codes(x, 1e-3, 5, 8).tolist() == [127, -128, 127, -128, 127, 5]


def run(x, dtype=torch.float32, *, residual=None, scale=None, zero=None, step=None, activation="none"):
    out = torch.empty(x.shape, dtype=dtype)
    table = scale is not None and scale.numel() > 1
    tile_kernel[(1,)](
        x, residual, scale, zero, step, out, *x.shape, ACTIVATION=activation, RESIDUAL=residual is not None, TABLE=table, BM=16, BN=32,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    x = torch.cat([torch.linspace(-12, 12, 428), torch.tensor([-90.0, 90.0, 0.0, -0.0, 1e-20, -1e-3])]).reshape(14, 31)
    of = {"none": lambda v: v, "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda v: F.gelu(v, approximate="tanh")}
    exact, got = of[activation](x.double()), run(x, activation=activation)
    assert ((got.double() - exact).abs() <= 1e-6 * exact.abs() + 1e-6).all()


def test_bfloat16_output_is_within_one_unit() -> None:
    """The interpreter cuts bits off where a GPU rounds: no equality here."""
    torch.manual_seed(0)
    x, residual = torch.randn(7, 30), torch.randn(7, 30).bfloat16()
    want = x.double() + residual.double()
    assert ((run(x, torch.bfloat16, residual=residual).double() - want).abs() <= 2**-7 * want.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_residual_comes_after_the_activation_and_the_cast_rounds_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(7, 30), torch.randn(7, 30).to(dtype)
    assert torch.equal(run(x, dtype, residual=residual), (x + residual.float()).to(dtype))
    silu = run(x, torch.float32, activation="silu")
    assert torch.equal(run(x, dtype, residual=residual, activation="silu"), (silu + residual.float()).to(dtype))


@pytest.mark.parametrize("row", [0, 2])
def test_int8_output_takes_the_row_of_the_step(row: int) -> None:
    torch.manual_seed(0)
    x, table, zero = torch.randn(5, 20) * 3, torch.tensor([0.1, 0.7, 0.011]), torch.tensor([4], dtype=torch.int32)
    got = run(x, torch.int8, scale=table, zero=zero, step=torch.tensor([row], dtype=torch.int32))
    want = [torch.round((x * s.reciprocal()).clamp(-132, 123)) + 4 for s in table]
    assert torch.equal(got.float(), want[row])
    assert not torch.equal(got.float(), want[1])
