"""Weight-only linear layer on the CPU: equals float64 on dequantized weights; one operator under torch.compile; clear errors."""

from __future__ import annotations

import pytest
import torch

from qdm_kernels.linear_w4a16 import op
from qdm_kernels.linear_w8a16 import op as op8

SHAPES = [(1, 1, 1, None), (3, 5, 7, None), (2, 33, 192, 3), (17, 8, 1152, 9), (1, 40, 64, 1), (0, 4, 16, None)]


def layer(
    draw, n: int, k: int, groups: int | None, backend: str, bias: bool = True, bits: int = 4
) -> tuple[op.PreparedWeight, torch.Tensor]:
    """A prepared layer and its weight in float64."""
    rng, shape, low = torch.Generator().manual_seed(2), (n,) if groups is None else (n, groups), -(1 << bits - 1)
    codes, zero = draw((n, k), low, -low - 1), draw(shape, low, -low - 1)
    scale = torch.rand(shape, generator=rng) + 0.1
    b = torch.randn(n, generator=rng) if bias else None

    def spread(t: torch.Tensor) -> torch.Tensor:
        return t.reshape(n, -1).repeat_interleave(k // (groups or 1), 1).double()

    return {4: op, 8: op8}[bits].prepare(codes, scale, zero, b, backend=backend), (codes.double() - spread(zero)) * spread(scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(("m", "n", "k", "groups"), SHAPES, ids=str)
def test_equals_float64(draw, backend: str, bias: bool, m: int, n: int, k: int, groups: int | None, bits: int) -> None:
    prepared, weight = layer(draw, n, k, groups, backend, bias, bits)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(1))
    want = x.double() @ weight.T + (prepared.bias.double() if bias else 0)
    got = op.linear(x, prepared)
    assert got.dtype == torch.float32
    assert ((got.double() - want).abs() <= 1e-6 * (x.double().abs() @ weight.abs().T + want.abs())).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes_and_leading_axes(draw, dtype: torch.dtype) -> None:
    prepared, weight = layer(draw, 24, 128, 2, "cpu")
    x = torch.randn(2, 3, 128).to(dtype)
    got = op.linear(x, prepared)
    assert (got.shape, got.dtype) == ((2, 3, 24), torch.float32 if dtype == torch.float64 else dtype)
    want = x.double() @ weight.T + prepared.bias.double()
    assert ((got.double() - want).norm() / want.norm()).item() < torch.finfo(got.dtype).eps + 1e-6
    assert op.linear(x, prepared, out_dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_operator(draw, bits: int) -> None:
    prepared, _ = layer(draw, 24, 128, 2, "reference", bits=bits)
    x, residual = torch.randn(2, 3, 128), torch.randn(2, 3, 24)
    args = (x, 24, prepared.bias, prepared.tensors, prepared.how, "silu", residual, torch.bfloat16)
    operator = getattr(torch.ops.qdm, prepared.op)
    torch.library.opcheck(operator.default, args)

    def call(x: torch.Tensor) -> torch.Tensor:
        return op.linear(x, prepared, activation="silu", residual=residual, out_dtype=torch.bfloat16)

    assert torch.equal(torch.compile(call, fullgraph=True, backend="aot_eager")(x), call(x))
    assert torch.equal(operator(*args), call(x))


CODES = torch.zeros(4, 128, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 0, dtype=torch.int8)}, "at least one of each"),
        ({"codes": CODES.float()}, "codes are signed int8"),
        ({"codes": CODES + 8}, "do not fit 4 bits"),
        ({"scale": torch.ones(3)}, r"scale is \[4\]"),
        ({"scale": torch.ones(4, 4), "zero_point": torch.zeros(4, 4).int()}, "groups of 64 or 128"),
        ({"zero_point": torch.zeros(4)}, "integer tensor"),
        ({"zero_point": torch.zeros(4, 2).int()}, "integer tensor"),
        ({"bias": torch.ones(3)}, "bias has one entry"),
        ({"backend": "cuda"}, "unknown backend"),
    ],
)
def test_prepare_errors(change: dict, message: str) -> None:
    args = {"codes": CODES, "scale": torch.ones(4), "zero_point": torch.zeros(4).int(), "bias": None} | change
    with pytest.raises(ValueError, match=message):
        op.prepare(**args)


@pytest.mark.parametrize(
    ("x", "more", "message"),
    [
        (torch.zeros(2, 64), {}, r"x is \[..., 128\]"),
        (torch.zeros(2, 128).int(), {}, "floating point"),
        (torch.zeros(2, 128), {"out_dtype": torch.int8}, "int8"),
        (torch.zeros(2, 128), {"residual": torch.zeros(4)}, "residual has the output's shape"),
        (torch.zeros(2, 128), {"activation": "relu"}, "activation is one of"),
    ],
)
def test_call_errors(x: torch.Tensor, more: dict, message: str) -> None:
    prepared = op.prepare(CODES, torch.ones(4), torch.zeros(4).int(), None, backend="reference")
    with pytest.raises(ValueError, match=message):
        op.linear(x, prepared, **more)
