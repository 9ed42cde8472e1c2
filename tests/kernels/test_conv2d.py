"""Convolution on codes: accumulators equal float64 truth, borders hold the zero point, outputs equal bit for bit across backends."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qdm_kernels.backend import Exact
from qdm_kernels.conv2d_w8a8 import cpu, op


@pytest.fixture(autouse=True, scope="module", params=["convolution", "unfolded", "unfolded by image"])
def form(request: pytest.FixtureRequest):
    """The two ways of the cpu backend, whatever the number of filters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "UNFOLD_OUTPUTS", 1 << 30 if request.param == "convolution" else 0)
        patch.setattr(cpu, "UNFOLD_BYTES", 0 if "by image" in request.param else 1 << 30)
        yield request.param


@dataclass(frozen=True)
class Case:
    x: tuple[int, int, int, int]  # B, I, H, W
    out: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.out, self.x[1] // self.groups, *self.kernel

    @property
    def keys(self) -> dict:
        return {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}

    def __str__(self) -> str:
        return f"{self.x}-{self.out}-k{self.kernel}-s{self.stride}-p{self.padding}-d{self.dilation}-g{self.groups}".replace(" ", "")


CASES = [
    Case((1, 3, 5, 5), 4),
    Case((2, 64, 9, 7), 33),
    Case((2, 64, 9, 7), 33, stride=(2, 2)),
    Case((1, 64, 9, 9), 16, stride=(2, 1), padding=(0, 1)),
    Case((2, 64, 9, 7), 33, kernel=(1, 1), padding=(0, 0)),
    Case((1, 40, 6, 6), 8, kernel=(1, 1), padding=(1, 1), stride=(2, 2)),
    Case((2, 64, 9, 7), 32, padding=(2, 2), dilation=(2, 2)),
    Case((1, 5, 9, 9), 6, kernel=(5, 2), padding=(3, 1)),
    Case((2, 6, 9, 7), 9, groups=3),
    Case((2, 64, 6, 6), 64, groups=64, stride=(2, 2)),
    Case((2, 64, 6, 6), 32, groups=4),
    Case((1, 64, 1, 1), 32),
    Case((1, 64, 1, 8), 32),
    Case((0, 64, 4, 4), 32),
    Case((1, 320, 8, 8), 32),
    # outputs of one pixel in width, and windows that hold nothing but border: oneDNN computes them wrong, or reads past the image
    Case((2, 17, 16, 1), 31, stride=(2, 2)),
    Case((2, 2, 5, 5), 4, kernel=(2, 1), padding=(2, 0), groups=2),
    Case((1, 36, 7, 1), 20, kernel=(2, 1), stride=(2, 2), padding=(0, 1), dilation=(2, 2), groups=4),
    Case((2, 7, 1, 8), 3, kernel=(2, 3), padding=(1, 2), dilation=(2, 2)),
]


def prepare(case: Case, w: Tensor, z_w: Tensor | None = None, *, backend: str = "cpu", bias: bool = True) -> op.PreparedConv2d:
    n, rng = w.shape[0], torch.Generator().manual_seed(5)
    scale, b = torch.rand(n, generator=rng) * 1e-3, torch.randn(n, generator=rng)
    zero = torch.zeros(n, dtype=torch.int32) if z_w is None else z_w
    return op.prepare(w, scale, zero, b if bias else None, **case.keys, backend=backend)


def truth(case: Case, x: Tensor, z_x: int, w: Tensor, z_w: Tensor) -> Tensor:
    return F.conv2d(x.double() - z_x, w.double() - z_w.view(-1, 1, 1, 1), None, case.stride, case.padding, case.dilation, case.groups)


@pytest.mark.parametrize("limit", [8, 64, 128], ids=lambda n: f"w{n}")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_accumulators(draw, case: Case, limit: int) -> None:
    w = draw(case.weight_shape, -limit, limit - 1)
    for z_w in (torch.zeros(case.out, dtype=torch.int8), draw((case.out,), -limit, limit - 1)):
        layers = [prepare(case, w, z_w, backend=name) for name in ("cpu", "reference")]
        for z_x in (0, 3, -128, 127):
            x = draw(case.x)
            want = truth(case, x, z_x, w, z_w)
            for layer in layers:
                got = op.accumulate(x, torch.tensor(z_x), layer)
                assert got.dtype == torch.int32
                assert torch.equal(got.double(), want)


@pytest.mark.parametrize("x_code", [-128, 127])
@pytest.mark.parametrize("w_code", [-128, 127, 64, -64])
@pytest.mark.parametrize("z_x", [-128, 0, 127])
def test_extremes(x_code: int, w_code: int, z_x: int) -> None:
    """320 channels x 9 taps: the sum passes 2^24, so float32 cannot hold it and one slice is not enough."""
    case = Case((1, 320, 3, 3), 4)
    w, x = torch.full(case.weight_shape, w_code, dtype=torch.int8), torch.full(case.x, x_code, dtype=torch.int8)
    layer = prepare(case, w, bias=False)
    want = truth(case, x, z_x, w, torch.zeros(4))
    assert torch.equal(op.accumulate(x, torch.tensor(z_x), layer).double(), want)
    assert torch.equal(op.conv2d(x, torch.tensor(1.0), torch.tensor(z_x), layer), want.to(torch.int32).float() * layer.scale)


@pytest.mark.parametrize("groups", [1, 2])
def test_slices_of_grouped_channels(draw, groups: int) -> None:
    """Enough channels that float32 must cut them: a slice takes the same channels of every group."""
    case = Case((1, 1024, 2, 2), 4, groups=groups)
    w, x = draw(case.weight_shape), draw(case.x)
    w[0], x[:] = 127, 127
    z_w = torch.zeros(4, dtype=torch.int32)
    layer = prepare(case, w)
    assert torch.equal(op.accumulate(x, torch.tensor(-128), layer).double(), truth(case, x, -128, w, z_w))


@settings(max_examples=60)
@given(st.data())
def test_outputs_are_bit_identical_across_backends(data: st.DataObject) -> None:
    groups = data.draw(st.integers(1, 3))
    sizes = st.integers(1, 9)
    pair = lambda top, low=1: st.tuples(st.integers(low, top), st.integers(low, top))  # noqa: E731
    case = Case(
        x=(data.draw(st.integers(0, 2)), groups * data.draw(sizes), data.draw(st.integers(5, 9)), data.draw(st.integers(5, 9))),
        out=groups * data.draw(sizes),
        kernel=data.draw(pair(3)),
        stride=data.draw(pair(2)),
        padding=data.draw(pair(2, 0)),
        dilation=data.draw(pair(2)),
        groups=groups,
    )
    limit, z_x = data.draw(st.sampled_from([8, 64, 128])), data.draw(st.integers(-128, 127))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    w = torch.randint(-limit, limit, case.weight_shape, generator=rng, dtype=torch.int8)
    z_w = torch.randint(-limit, limit, (case.out,), generator=rng, dtype=torch.int8) * data.draw(st.integers(0, 1))
    x = torch.randint(-128, 128, case.x, generator=rng, dtype=torch.int8)
    a, b = (prepare(case, w, z_w, backend=name) for name in ("cpu", "reference"))
    for s in (torch.tensor([0.0173]), torch.rand(case.x[0], 1, 1, 1, generator=rng)):
        got, want = (op.conv2d(x, s, torch.tensor(z_x), layer) for layer in (a, b))
        assert torch.equal(got, want)


def test_border_holds_the_zero_point(draw) -> None:
    """Mutation check: padding with code 0 instead of z_x gives other numbers, and so does no border at all."""
    case, z_x = Case((1, 16, 5, 5), 8), 50
    w, x = draw(case.weight_shape, -64, 64), draw(case.x)
    layer = prepare(case, w)
    got = op.accumulate(x, torch.tensor(z_x), layer)
    pad = lambda code: F.conv2d(F.pad(x.double(), (1, 1, 1, 1), value=code) - z_x, w.double())  # noqa: E731
    assert torch.equal(got.double(), pad(z_x))
    wrong = pad(0)
    assert not torch.equal(got.double(), wrong)
    assert torch.equal(got[:, :, 1:-1, 1:-1].double(), wrong[:, :, 1:-1, 1:-1])


@pytest.mark.parametrize("exact", [Exact.FULL, Exact.SMALL, Exact.NONE], ids=lambda e: e.name)
def test_scales_and_zero_points_change_without_packing_again(draw, probe_as, exact: Exact) -> None:
    """One prepared layer serves every denoising step, whichever way the zero point travels."""
    probe_as(exact)
    case = Case((2, 33, 6, 5), 16)
    w, x = draw(case.weight_shape, -64, 64), draw(case.x)
    layer, ref = prepare(case, w), prepare(case, w, backend="reference")
    for z, s in ((0, 0.1), (-128, 0.2), (90, 0.01), (127, 3.0), (0, 0.1)):
        args = x, torch.tensor(s), torch.tensor(z)
        assert torch.equal(op.conv2d(*args, layer), op.conv2d(*args, ref))


@pytest.mark.parametrize(
    ("exact", "codes", "zero_point", "groups", "strategy"),
    [
        (Exact.FULL, 64, 0, 1, "onednn"),
        (Exact.FULL, 64, 127, 1, "onednn"),  # w - z_w past int8: a filter of ones carries the input sum
        (Exact.FULL, 64, 127, 2, "fp32"),
        (Exact.FULL, 64, -60, 2, "onednn"),
        (Exact.SMALL, 64, 0, 1, "onednn"),
        (Exact.SMALL, 7, 7, 2, "onednn"),
        (Exact.SMALL, 65, 0, 1, "fp32"),
        (Exact.NONE, 8, 0, 1, "fp32"),
    ],
)
def test_strategy_follows_the_probe_and_stays_exact(
    draw, probe_as, exact: Exact, codes: int, zero_point: int, groups: int, strategy: str
) -> None:
    """Codes stay within 64 where the strategy is onednn, so that the outcome is exact on the machine under test too.

    -60 with codes of 64 reaches 124 once folded: only VNNI machines may run that, so it is prepared and not compared here.
    """
    probe_as(exact)
    case = Case((1, 256, 4, 4), 8, groups=groups)
    w, x = draw(case.weight_shape, -codes, codes), draw(case.x)
    w[0, 0, 0, 0] = codes
    z_w = torch.full((8,), zero_point, dtype=torch.int32)
    layer, ref = prepare(case, w, z_w), prepare(case, w, z_w, backend="reference")
    assert layer.strategy == strategy
    assert (layer.reason is None) == (strategy == "onednn")
    if zero_point == -60:
        return
    for z in (0, -100, 127):
        assert torch.equal(op.accumulate(x, torch.tensor(z), layer), op.accumulate(x, torch.tensor(z), ref))
        args = x, torch.tensor(0.3), torch.tensor(z)
        assert torch.equal(op.conv2d(*args, layer), op.conv2d(*args, ref))


def test_epilogue_is_one_multiply_and_one_add(draw) -> None:
    case, s = Case((2, 72, 6, 6), 40), torch.tensor(0.0317)
    w, x = draw(case.weight_shape, -64, 64), draw(case.x)
    layer = prepare(case, w)
    acc = op.accumulate(x, torch.tensor(9), layer)
    assert torch.equal(op.conv2d(x, s, torch.tensor(9), layer), acc.float() * (s * layer.scale) + layer.bias)


@pytest.mark.parametrize("limit", [64, 128])
@pytest.mark.parametrize("z_x", [0, 9])
def test_channels_last_out_from_any_layout(draw, limit: int, z_x: int) -> None:
    case = Case((2, 12, 6, 5), 8)
    w, x = draw(case.weight_shape, -limit, limit - 1), draw(case.x)
    layer = prepare(case, w)
    args = torch.tensor(0.1), torch.tensor(z_x), layer
    y = op.conv2d(x.contiguous(memory_format=torch.channels_last), *args)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, op.conv2d(x.contiguous(), *args))
    assert torch.equal(y, op.conv2d(x.transpose(2, 3).contiguous().transpose(2, 3), *args))


@pytest.mark.parametrize("limit", [64, 128])
def test_autocast_and_deepcopy_change_nothing(draw, limit: int) -> None:
    case = Case((1, 12, 6, 5), 8)
    w, args = draw(case.weight_shape, -limit, limit - 1), (draw(case.x), torch.tensor(0.1), torch.tensor(3))
    layer = prepare(case, w)
    want = op.conv2d(*args, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(op.conv2d(*args, copy.deepcopy(layer)), want)


def test_leaves_the_input_alone(draw) -> None:
    case = Case((1, 12, 6, 5), 8)
    w, x = draw(case.weight_shape, -64, 64), draw(case.x).contiguous(memory_format=torch.channels_last)
    kept = x.clone()
    op.conv2d(x, torch.tensor(0.1), torch.tensor(3), prepare(case, w))
    assert torch.equal(x, kept)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 12, 5, 5), "codes are int8"),
        (torch.zeros(1, 11, 5, 5, dtype=torch.int8), r"\[B, 12, H, W\]"),
        (torch.zeros(12, 5, 5, dtype=torch.int8), r"\[B, 12, H, W\]"),
    ],
)
def test_call_errors(draw, x: Tensor, message: str) -> None:
    case = Case((1, 12, 6, 5), 8)
    layer = prepare(case, draw(case.weight_shape))
    with pytest.raises(ValueError, match=message):
        op.conv2d(x, torch.tensor(0.1), torch.tensor(3), layer)


def test_filters_must_divide_into_groups(draw) -> None:
    with pytest.raises(ValueError, match="do not divide"):
        op.prepare(draw((7, 2, 3, 3)), torch.ones(7), torch.zeros(7, dtype=torch.int32), None, groups=2)
