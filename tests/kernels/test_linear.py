"""Linear layer on codes: accumulators equal int64 truth, outputs equal bit for bit across backends."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdm_kernels.backend import Exact
from qdm_kernels.linear_w8a8 import op

SHAPES = [(1, 1, 1), (3, 7, 5), (17, 64, 33), (5, 129, 2), (2, 1153, 31), (65, 320, 96), (0, 64, 8), (1, 9000, 3)]


def truth(x: Tensor, z_x: int, w: Tensor, z_w: Tensor) -> Tensor:
    return (x.long() - z_x) @ (w.long() - z_w.long()[:, None]).T


def prepare(w: Tensor, z_w: Tensor | None = None, *, backend: str = "cpu", bias: bool = True) -> op.PreparedLinear:
    n, rng = w.shape[0], torch.Generator().manual_seed(5)
    scale, b = torch.rand(n, generator=rng) * 1e-3, torch.randn(n, generator=rng)
    return op.prepare(w, scale, torch.zeros(n, dtype=torch.int32) if z_w is None else z_w, b if bias else None, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("limit", [8, 64, 128], ids=lambda n: f"w{n}")
@pytest.mark.parametrize("m,k,n", SHAPES, ids=lambda v: str(v))
def test_accumulators(draw, backend: str, limit: int, m: int, k: int, n: int) -> None:
    w = draw((n, k), -limit, limit - 1)
    for z_w in (torch.zeros(n, dtype=torch.int8), draw((n,), -limit, limit - 1)):
        layer = prepare(w, z_w, backend=backend)
        for z_x in (0, 3, -128, 127):
            x = draw((m, k))
            got = op.accumulate(x, torch.tensor(z_x), layer)
            assert got.dtype == torch.int32
            assert torch.equal(got.long(), truth(x, z_x, w, z_w))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("x_code", [-128, 127])
@pytest.mark.parametrize("w_code", [-128, 127, 64, -64])
@pytest.mark.parametrize("z_x", [-128, 0, 127])
def test_extremes(backend: str, x_code: int, w_code: int, z_x: int) -> None:
    """K = 3000: the sum passes 2^24, so float32 cannot hold it and one slice is not enough."""
    w, x = torch.full((5, 3000), w_code, dtype=torch.int8), torch.full((2, 3000), x_code, dtype=torch.int8)
    z_w = torch.zeros(5, dtype=torch.int32)
    layer = prepare(w, z_w, backend=backend, bias=False)
    assert torch.equal(op.accumulate(x, torch.tensor(z_x), layer).long(), truth(x, z_x, w, z_w))
    want = truth(x, z_x, w, z_w).to(torch.int32).float() * layer.scale
    assert torch.equal(op.linear(x, torch.tensor(1.0), torch.tensor(z_x), layer), want)


@given(
    m=st.integers(0, 5),
    k=st.integers(1, 150),
    n=st.integers(1, 20),
    limit=st.sampled_from([8, 64, 128]),
    z_x=st.integers(-128, 127),
    zeros=st.booleans(),
)
def test_outputs_are_bit_identical_across_backends(m: int, k: int, n: int, limit: int, z_x: int, zeros: bool) -> None:
    rng = torch.Generator().manual_seed(m * 1000 + k)
    w = torch.randint(-limit, limit, (n, k), generator=rng, dtype=torch.int8)
    z_w = torch.randint(-limit, limit, (n,), generator=rng, dtype=torch.int8) * zeros
    x = torch.randint(-128, 128, (m, k), generator=rng, dtype=torch.int8)
    a, b = (prepare(w, z_w, backend=name, bias=zeros) for name in ("cpu", "reference"))
    for s in (torch.tensor(0.0173), torch.rand(m, 1, generator=rng)):
        assert torch.equal(op.linear(x, s, torch.tensor(z_x), a), op.linear(x, s, torch.tensor(z_x), b))


def test_epilogue_is_one_multiply_and_one_add(draw) -> None:
    """y = acc.float() * (x_scale * w_scale) + bias, the form of the training graph."""
    w, x, s = draw((96, 640), -64, 64), draw((33, 640)), torch.tensor(0.0317)
    layer = prepare(w)
    acc = op.accumulate(x, torch.tensor(9), layer)
    assert torch.equal(op.linear(x, s, torch.tensor(9), layer), acc.float() * (s * layer.scale) + layer.bias)


def test_close_to_float64(draw) -> None:
    w, z_w, x, s = draw((40, 333)), draw((40,)), draw((7, 333)), torch.tensor(0.02)
    layer = prepare(w, z_w)
    want = (x.double() - 11) * 0.02 @ ((w.double() - z_w[:, None]) * layer.scale.double()[:, None]).T + layer.bias.double()
    got = op.linear(x, s, torch.tensor(11), layer).double()
    assert (got - want).norm() / want.norm() < 1e-6


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 4), (2, 0)], ids=str)
def test_leading_axes_and_one_element_scales(draw, lead: tuple[int, ...]) -> None:
    w, x = draw((6, 50), -64, 64), draw((*lead, 50))
    layer = prepare(w)
    y = op.linear(x, torch.tensor([0.1]), torch.tensor([5]), layer)
    assert y.shape == (*lead, 6)
    flat = op.linear(x.reshape(-1, 50), torch.tensor(0.1), torch.tensor(5), layer)
    assert torch.equal(y.reshape(-1, 6), flat)
    per_token = op.linear(x, torch.full((*lead, 1), 0.1), torch.tensor(5), layer)
    assert torch.equal(per_token, y)


def test_scales_and_zero_points_change_without_packing_again(draw) -> None:
    """One prepared layer serves every denoising step."""
    w, x = draw((16, 100), -64, 64), draw((4, 100))
    layer, ref = prepare(w), prepare(w, backend="reference")
    for z, s in ((0, 0.1), (-128, 0.2), (90, 0.01), (0, 0.1)):
        args = x, torch.tensor(s), torch.tensor(z)
        assert torch.equal(op.linear(*args, layer), op.linear(*args, ref))


@pytest.mark.parametrize("limit", [64, 128])
def test_autocast_grad_and_deepcopy_change_nothing(draw, limit: int) -> None:
    w, x, s = draw((16, 100), -limit, limit - 1), draw((4, 100)), torch.tensor(0.1, requires_grad=True)
    layer = prepare(w)
    want = op.linear(x, s, torch.tensor(3), layer)
    assert not want.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.linear(x, s, torch.tensor(3), layer), want)
    assert torch.equal(op.linear(x, s, torch.tensor(3), copy.deepcopy(layer)), want)


def test_strided_input(draw) -> None:
    w, x = draw((16, 100), -64, 64), draw((100, 4)).T
    layer = prepare(w)
    assert torch.equal(op.accumulate(x, torch.tensor(1), layer), op.accumulate(x.contiguous(), torch.tensor(1), layer))


@pytest.mark.parametrize(
    ("exact", "codes", "zero_point", "strategy"),
    [
        (Exact.FULL, 64, 0, "onednn"),
        (Exact.FULL, 64, 127, "onednn"),  # w - z_w past int8: a row of ones carries the input sum
        (Exact.SMALL, 64, 0, "onednn"),
        (Exact.SMALL, 8, 8, "onednn"),
        (Exact.SMALL, 65, 0, "fp32"),
        (Exact.NONE, 8, 0, "fp32"),
    ],
)
def test_strategy_follows_the_probe_and_stays_exact(draw, probe_as, exact: Exact, codes: int, zero_point: int, strategy: str) -> None:
    """Codes stay within 64 where the strategy is onednn, so that the outcome is exact on the machine under test too."""
    probe_as(exact)
    w, x = draw((24, 2100), -codes, codes - (codes == 8)), draw((5, 2100))
    w[0, 0] = codes - (codes == 8)
    z_w = torch.full((24,), zero_point - (zero_point == 8), dtype=torch.int32)
    layer, ref = prepare(w, z_w), prepare(w, z_w, backend="reference")
    assert layer.strategy == strategy
    assert (layer.reason is None) == (strategy == "onednn")
    for z in (0, -100, 127):
        assert torch.equal(op.accumulate(x, torch.tensor(z), layer), op.accumulate(x, torch.tensor(z), ref))
        assert torch.equal(op.linear(x, torch.tensor(0.3), torch.tensor(z), layer), op.linear(x, torch.tensor(0.3), torch.tensor(z), ref))


def test_row_of_ones_falls_back_to_slices_past_2_24(probe_as) -> None:
    """A and z_w X each pass 2^24 and cancel: subtracting them as float32 would round twice."""
    probe_as(Exact.FULL)
    w = torch.full((3, 4001), 63, dtype=torch.int8)
    w[:, ::2] = 64
    x, z_w = torch.full((2, 4001), 127, dtype=torch.int8), torch.tensor([-127, -128, -100])
    x[:, ::3] = 126
    layer, ref = prepare(w, z_w), prepare(w, z_w, backend="reference")
    assert layer.strategy == "onednn"
    args = x, torch.tensor(1.0), torch.tensor(-128)
    assert torch.equal(op.accumulate(args[0], args[2], layer), op.accumulate(args[0], args[2], ref))
    assert torch.equal(op.linear(*args, layer), op.linear(*args, ref))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(4, 6)}, "int8 with 2 axes"),
        ({"codes": torch.zeros(4, 6, 1, dtype=torch.int8)}, "int8 with 2 axes"),
        ({"scale": torch.ones(6)}, r"scale has one entry per output, \[4\]"),
        ({"zero_point": torch.zeros(4)}, "integer tensor"),
        ({"bias": torch.zeros(())}, "bias has one entry"),
        ({"backend": "cuda"}, "unknown backend"),
        ({"codes": torch.zeros(4, 0, dtype=torch.int8)}, "at least one input"),
    ],
)
def test_prepare_errors(change: dict, message: str) -> None:
    args = {
        "codes": torch.zeros(4, 6, dtype=torch.int8),
        "scale": torch.ones(4),
        "zero_point": torch.zeros(4, dtype=torch.int32),
        "bias": None,
    }
    args |= change
    with pytest.raises(ValueError, match=message):
        op.prepare(args.pop("codes"), args.pop("scale"), args.pop("zero_point"), args.pop("bias"), **args)


@pytest.mark.parametrize(
    ("x", "z", "message"),
    [
        (torch.zeros(2, 6), torch.tensor(0), "codes are int8"),
        (torch.zeros(2, 5, dtype=torch.int8), torch.tensor(0), "has 5 features, the layer takes 6"),
        (torch.zeros(2, 6, dtype=torch.int8), torch.tensor([0, 1]), "one integer"),
        (torch.zeros(2, 6, dtype=torch.int8), torch.tensor(0.0), "one integer"),
    ],
)
def test_call_errors(x: Tensor, z: Tensor, message: str) -> None:
    layer = prepare(torch.zeros(4, 6, dtype=torch.int8))
    with pytest.raises(ValueError, match=message):
        op.linear(x, torch.tensor(1.0), z, layer)
