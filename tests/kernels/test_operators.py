"""The registered operators: opcheck, one graph under torch.compile with the eager bits, step tables on the device."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from qdm_kernels.backend import Exact
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.linear_w8a8 import op
from qdm_kernels.prepared import flatten, unflatten
from qdm_kernels.quantize.op import quantize, quantize_per_token

SCALES = torch.tensor([0.011, 0.02, 0.5])
ZEROS = torch.tensor([3, -128, 90], dtype=torch.int32)
STEPS = [torch.tensor([i], dtype=torch.int32) for i in range(3)]


@pytest.fixture
def layer(draw) -> op.PreparedLinear:
    w, bias = draw((24, 96), -64, 64), torch.linspace(-3, 3, 24)
    return op.prepare(w, torch.linspace(1e-3, 2e-3, 24), torch.arange(24, dtype=torch.int32) - 9, bias, backend="reference")


def operands(draw, layer: op.PreparedLinear, **extra: object) -> tuple:
    """Arguments of qdm::linear_w8a8 with 2 x 5 tokens."""
    named = {"activation": "none", "residual": None, "out_dtype": torch.float32, "out_scale": None, "out_zero_point": None} | extra
    return (draw((2, 5, 96)), SCALES, ZEROS, layer.scale, layer.bias, layer.tensors, layer.how, STEPS[1], *named.values())


@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"activation": "silu", "residual": torch.ones(2, 5, 24, dtype=torch.bfloat16), "out_dtype": torch.bfloat16},
        {"activation": "gelu_tanh", "out_dtype": torch.int8, "out_scale": SCALES, "out_zero_point": ZEROS},
        {"activation": "geglu", "out_dtype": torch.int8, "out_scale": SCALES, "out_zero_point": ZEROS},
    ],
    ids=["plain", "residual", "int8", "gated"],
)
def test_opcheck_linear(draw, layer: op.PreparedLinear, extra: dict) -> None:
    torch.library.opcheck(torch.ops.qdm.linear_w8a8.default, operands(draw, layer, **extra))


def test_opcheck_quantize() -> None:
    x = torch.randn(3, 7, 16)
    torch.library.opcheck(torch.ops.qdm.quantize.default, (x, SCALES, ZEROS, 8, STEPS[2]))
    torch.library.opcheck(torch.ops.qdm.quantize.default, (x, SCALES[:1], ZEROS[:1], 4, None))
    torch.library.opcheck(torch.ops.qdm.quantize_per_token.default, (x, 8))


def test_one_graph_with_the_eager_bits(draw) -> None:
    """Static codes by a table, then rows of their own; weights in oneDNN's opaque layout and as plain integers."""
    zero = torch.zeros((), dtype=torch.int32)
    first = op.prepare(draw((32, 96), -8, 7), torch.rand(32) * 1e-3, torch.zeros(32, dtype=torch.int32), torch.randn(32), backend="cpu")
    second = op.prepare(draw((24, 32)), torch.rand(24) * 1e-3, torch.zeros(24, dtype=torch.int32), None, backend="reference")

    def forward(x: Tensor, step: Tensor) -> Tensor:
        hidden = op.linear(quantize(x, SCALES, ZEROS, 8, step), SCALES, ZEROS, first, step=step)
        return op.linear(*quantize_per_token(hidden, 8), zero, second)

    compiled = torch.compile(forward, fullgraph=True)
    x, seen = torch.randn(2, 5, 96), []
    for step in STEPS:
        seen.append(compiled(x, step))
        assert torch.equal(seen[-1], forward(x, step))
    assert not torch.equal(seen[0], seen[1])


def test_rows_of_a_table_are_rows_of_the_eager_call(draw, layer: op.PreparedLinear) -> None:
    x, codes = torch.randn(4, 96), draw((4, 96))
    results = []
    for i, step in enumerate(STEPS):
        assert torch.equal(quantize(x, SCALES, ZEROS, 8, step), quantize(x, SCALES[i], ZEROS[i], 8))
        results.append(op.linear(codes, SCALES, ZEROS, layer, step=step))
        assert torch.equal(results[-1], op.linear(codes, SCALES[i], ZEROS[i], layer))
    assert not torch.equal(results[0], results[1])


def test_a_table_of_one_entry_serves_every_step(draw, layer: op.PreparedLinear) -> None:
    codes, zero = draw((4, 96)), torch.tensor(5, dtype=torch.int32)
    assert torch.equal(op.linear(codes, SCALES, zero, layer, step=STEPS[2]), op.linear(codes, SCALES[2], zero, layer))


def test_epilogues(draw, layer: op.PreparedLinear) -> None:
    codes, zero = draw((3, 96)), torch.tensor(0)
    y = op.linear(codes, SCALES[0], zero, layer)
    residual = torch.randn(3, 24).half()
    got = op.linear(codes, SCALES[0], zero, layer, activation="silu", residual=residual, out_dtype=torch.float16)
    assert got.dtype == torch.float16
    want = y.double() * torch.sigmoid(y.double()) + residual.double()
    assert torch.allclose(got.double(), want, rtol=2**-10, atol=1e-4)
    got = op.linear(codes, SCALES[0], zero, layer, out_dtype=torch.int8, out_scale=SCALES[1], out_zero_point=ZEROS[0])
    assert torch.equal(got, quantize(y, SCALES[1], ZEROS[0], 8))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gated_outputs(draw, backend: str) -> None:
    """[value, gate] -> value * gelu(gate), then residual and codes; an odd number of outputs, and other layers, have no gates."""
    codes, zero, w = draw((3, 96)), torch.tensor(0), draw((24, 96), -8, 7)
    layer = op.prepare(w, torch.rand(24) * 1e-3, torch.zeros(24, dtype=torch.int32), torch.randn(24), backend=backend)
    value, gate = op.linear(codes, SCALES[0], zero, layer).chunk(2, -1)
    residual, want = torch.randn(3, 12), value * torch.nn.functional.gelu(gate)
    assert torch.equal(op.linear(codes, SCALES[0], zero, layer, activation="geglu", residual=residual), want + residual)
    got = op.linear(codes, SCALES[0], zero, layer, activation="geglu", out_dtype=torch.int8, out_scale=SCALES[1], out_zero_point=ZEROS[0])
    assert torch.equal(got, quantize(want, SCALES[1], ZEROS[0], 8))
    with pytest.raises(ValueError, match=r"residual has the output's shape, \(3, 12\)"):
        op.linear(codes, SCALES[0], zero, layer, activation="geglu", residual=torch.randn(3, 24))
    odd = op.prepare(w[:23], torch.rand(23), torch.zeros(23, dtype=torch.int32), None, backend=backend)
    with pytest.raises(ValueError, match="halves the outputs of a linear layer with integer codes, got 23"):
        op.linear(codes, SCALES[0], zero, odd, activation="geglu")
    with pytest.raises(ValueError, match="of no other"):
        Epilogue("geglu").check()


def test_states_survive_text(draw, probe_as) -> None:
    """Every kind of state, from its tensors and its JSON: the same accumulators."""
    x, z = draw((3, 9000)), torch.tensor(7)
    for exact, limit in ((Exact.FULL, 8), (Exact.NONE, 128)):
        probe_as(exact)
        layer = op.prepare(draw((5, 9000), -limit, limit - 1), torch.ones(5), torch.zeros(5, dtype=torch.int32), None, backend="cpu")
        home = op.implementation("linear_w8a8", "cpu")
        again = unflatten(*flatten(layer.state), home)
        assert type(again) is type(layer.state)
        assert torch.equal(home.accumulate(x, z, again), op.accumulate(x, z, layer))
        json.loads(layer.how.partition(" ")[2])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "relu"}, "activation is one of"),
        ({"out_dtype": torch.float64}, "an output is"),
        ({"out_dtype": torch.int8}, "int8 output takes"),
        ({"out_scale": SCALES, "out_zero_point": ZEROS}, "int8 output takes"),
        ({"residual": torch.ones(3, 1)}, "residual has the output's shape"),
        ({"step": torch.tensor([1])}, "step is one int32"),
    ],
)
def test_errors(draw, layer: op.PreparedLinear, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        op.linear(draw((3, 96)), SCALES[0], torch.tensor(0), layer, **change)
