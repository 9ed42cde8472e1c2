"""The Triton convolutions: sums equal int64 truth, borders hold the zero point, outputs equal the reference bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.conv2d_w4a8 import reference as reference4
from qdm_kernels.conv2d_w4a8 import triton as triton4
from qdm_kernels.conv2d_w8a8 import op, reference
from qdm_kernels.conv2d_w8a8 import triton as triton8
from qdm_kernels.conv2d_w8a8.tiles import TILES
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.epilogue.reference import finish as finish_plainly
from qdm_kernels.gemm.tiles import Plan
from qdm_kernels.geometry import Conv2dGeometry as G

KERNELS = {8: triton8, 4: triton4}
SMALLEST = TILES[-1]
SAME = G(padding=(1, 1))
ROW = torch.tensor([1], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    x: tuple[int, int, int, int]  # B, I, H, W
    out: int
    kernel: tuple[int, int] = (3, 3)
    geometry: G = SAME

    def __str__(self) -> str:
        g = self.geometry
        return f"{self.x}-{self.out}-k{self.kernel}-s{g.stride}-p{g.border}-d{g.dilation}".replace(" ", "")


CASES = [
    Case((2, 64, 5, 7), 33),
    Case((1, 64, 9, 8), 24, geometry=G(stride=(2, 2), padding=(1, 1))),
    Case((1, 192, 6, 6), 17, geometry=G(stride=(2, 2), padding_end=(1, 1))),
    Case((2, 128, 5, 5), 65, (1, 1), G()),
    Case((1, 64, 5, 5), 8, (1, 1), G(padding=(1, 2), stride=(2, 1))),  # a border with no valid tap
    Case((1, 48, 4, 4), 20),
    Case((1, 16, 5, 3), 20),
    Case((1, 64, 1, 1), 16),
    Case((1, 64, 1, 9), 16),
    Case((1, 64, 9, 1), 16, geometry=G(stride=(2, 2), padding=(1, 1))),
    Case((1, 80, 9, 9), 7, (5, 2), G(padding=(3, 1), dilation=(2, 2))),
    Case((0, 64, 4, 4), 16),
]


def draw(case: Case, bits: int, seed: int = 0, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight codes, weight zero points."""
    rng, limit = torch.Generator().manual_seed(seed), 1 << bits - 1
    x = torch.randint(-128, 128, case.x, generator=rng, dtype=torch.int8)
    w = torch.randint(-limit, limit, (case.out, case.x[1], *case.kernel), generator=rng, dtype=torch.int8)
    zero = torch.randint(-limit, limit, (case.out,), generator=rng, dtype=torch.int32)
    return x, w, zero * (not centred)


def truth(case: Case, x: Tensor, z_x: int, w: Tensor, z_w: Tensor) -> Tensor:
    """int64 sums, term by term: unfolded windows of real zeros outside the image."""
    g = case.geometry
    real = F.pad(x.long() - z_x, g.border)
    (oh, ow), (kh, kw) = g.output_size(case.x[2:], case.kernel), case.kernel
    windows = [
        real[:, :, r * g.dilation[0] :, s * g.dilation[1] :][:, :, :: g.stride[0], :: g.stride[1]][:, :, :oh, :ow]
        for r in range(kh)
        for s in range(kw)
    ]
    return torch.einsum("bithw,oit->bohw", torch.stack(windows, 2), (w.long() - z_w.view(-1, 1, 1, 1).long()).flatten(2))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums(case: Case, bits: int) -> None:
    x, w, z_w = draw(case, bits)
    state = KERNELS[bits].prepare(w, z_w, case.geometry)
    for z_x in (0, 101):
        got = triton8.accumulate(x, torch.tensor([z_x]), state)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), truth(case, x, z_x, w, z_w))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("splits", [1, 3])
def test_weight_zero_points_leave_by_a_filter_of_ones(bits: int, splits: int) -> None:
    case = CASES[2]
    x, w, z_w = draw(case, bits, centred=False)
    state = KERNELS[bits].prepare(w, z_w, case.geometry)
    assert state.centre is not None
    got = triton8.launch(x, torch.tensor(-77), state, torch.int32, plan=Plan(SMALLEST, splits))
    assert torch.equal(got.long(), truth(case, x, -77, w, z_w))


def test_weight_zero_points_that_fit_are_folded() -> None:
    x, w, _ = draw(CASES[0], 4)
    z_w = torch.full((33,), 100, dtype=torch.int32)
    state = triton8.prepare(w, z_w, CASES[0].geometry)
    assert state.centre is None
    assert torch.equal(triton8.accumulate(x, torch.tensor(5), state).long(), truth(CASES[0], x, 5, w, z_w))


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_tile_and_splits(tile, bits: int) -> None:
    case = Case((1, 128, 5, 5), 68)
    x, w, z_w = draw(case, bits)
    state, want = KERNELS[bits].prepare(w, z_w, case.geometry), truth(case, x, 9, w, z_w)
    for splits in (1, 4):
        assert torch.equal(triton8.launch(x, torch.tensor(9), state, torch.int32, plan=Plan(tile, splits)).long(), want)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("x_code", "w_code", "z_x"), [(-128, -128, 127), (127, -128, -128), (-128, 127, 127), (127, 127, 0)])
def test_extremes(bits: int, x_code: int, w_code: int, z_x: int) -> None:
    """Past 2^24, and with the factor 16 of packed weights close to the bound of int32."""
    case = Case((1, 1024, 3, 3), 4)
    w_code = max(min(w_code, 7), -8) if bits == 4 else w_code
    x, w = torch.full(case.x, x_code, dtype=torch.int8), torch.full((4, 1024, 3, 3), w_code, dtype=torch.int8)
    state = KERNELS[bits].prepare(w, torch.zeros(4, dtype=torch.int32), case.geometry)
    got = triton8.accumulate(x, torch.tensor(z_x), state)
    assert torch.equal(got.long(), truth(case, x, z_x, w, torch.zeros(4)))


def outputs(case: Case, bits: int, end: Epilogue, x_scale: Tensor, z_x: Tensor, **launch) -> tuple[Tensor, Tensor]:
    """Of the kernel, and of the reference with the epilogue after it."""
    x, w, z_w = draw(case, bits)
    rng = torch.Generator().manual_seed(3)
    w_scale, bias = torch.rand(case.out, 1, 1, generator=rng) * 1e-3, torch.randn(case.out, 1, 1, generator=rng)
    home, plain = KERNELS[bits], {8: reference, 4: reference4}[bits]
    state = home.prepare(w, z_w, case.geometry)
    got = triton8.launch(x, z_x, state, end.out_dtype, x_scale=x_scale, w_scale=w_scale, bias=bias, end=end, **launch)
    return got, op.run(x, x_scale, z_x, w_scale, bias, plain, plain.prepare(w, z_w, case.geometry), end)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("splits", [1, 2])
def test_outputs_have_the_bits_of_the_contract(bits: int, splits: int) -> None:
    case = CASES[0]
    for s in (torch.tensor([0.0173]), torch.tensor([0.01, 0.3]).view(2, 1, 1, 1)):
        got, want = outputs(case, bits, Epilogue(), s, torch.tensor(-9), plan=Plan(SMALLEST, splits))
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(got, want)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_rows_of_the_tables(row: int) -> None:
    scales, zeros = torch.tensor([0.011, 0.02, 0.5]), torch.tensor([3, -128, 90], dtype=torch.int8)
    step = torch.tensor([row], dtype=torch.int32)
    end = Epilogue(out_dtype=torch.int8, out_scale=scales.flip(0), out_zero_point=zeros, step=step)
    got, want = outputs(CASES[0], 8, end, scales, zeros)
    assert torch.equal(got, want)
    other, _ = outputs(CASES[0], 8, Epilogue(step=ROW * ((row + 1) % 3)), scales, zeros)
    assert not torch.equal(outputs(CASES[0], 8, Epilogue(step=step), scales, zeros)[0], other)


def test_tables_of_one_entry_serve_every_step() -> None:
    end = Epilogue(out_dtype=torch.int8, out_scale=torch.tensor([0.05]), out_zero_point=torch.tensor([1]), step=ROW)
    got, want = outputs(CASES[0], 8, end, torch.tensor([0.1, 0.2]), torch.tensor([7]))
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("splits", [1, 2])
def test_activation_and_residual(dtype: torch.dtype, splits: int) -> None:
    case = CASES[1]
    residual = torch.randn(1, 24, 5, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    end = Epilogue(activation="silu", residual=residual, out_dtype=dtype)
    got, want = outputs(case, 8, end, torch.tensor([0.02]), torch.tensor([4]), plan=Plan(SMALLEST, splits))
    exact = finish_plainly(outputs(case, 8, Epilogue(), torch.tensor([0.02]), torch.tensor([4]))[1], end)
    assert torch.equal(want, exact)
    unit = 2**-10 if dtype == torch.float16 else 2**-21
    assert ((got.double() - want.double()).abs() <= unit * (want.double().abs() + residual.double().abs())).all()


@pytest.mark.parametrize("layout", ["first", "strided"])
def test_any_memory_format(layout: str) -> None:
    case = CASES[0]
    x, w, z_w = draw(case, 8)
    state = triton8.prepare(w, z_w, case.geometry)
    want = truth(case, x, 0, w, z_w)
    x = x.contiguous() if layout == "first" else x.transpose(2, 3).contiguous().transpose(2, 3)
    assert torch.equal(triton8.accumulate(x, torch.tensor(0), state).long(), want)


def test_an_image_has_the_same_bits_alone_and_in_a_batch() -> None:
    case = Case((4, 64, 5, 5), 20)
    x, w, z_w = draw(case, 8)
    state = triton8.prepare(w, z_w, case.geometry)
    together = triton8.accumulate(x, torch.tensor(3), state)
    for i in range(4):
        assert torch.equal(triton8.accumulate(x[i : i + 1], torch.tensor(3), state), together[i : i + 1])


def random_case(seed: int) -> Case:
    rng = random.Random(seed)
    kernel = rng.choice([(3, 3), (3, 3), (1, 1), (2, 3)])
    pad = lambda k: rng.randint(0, k)  # noqa: E731
    g = G(
        stride=(rng.randint(1, 2), rng.randint(1, 2)),
        padding=(pad(kernel[0]), pad(kernel[1])),
        padding_end=(pad(kernel[0]), pad(kernel[1])),
        dilation=(rng.randint(1, 2), 1),
    )
    low = g.dilation[0] * (kernel[0] - 1) + 1, kernel[1]
    return Case(
        (rng.randint(1, 3), 16 * rng.randint(1, 13), low[0] + rng.randint(0, 5), low[1] + rng.randint(0, 5)), rng.randint(1, 70), kernel, g
    )


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("seeds", [range(8), pytest.param(range(8, 200), marks=pytest.mark.slow)], ids=["8", "192"])
def test_random_odd_shapes(bits: int, seeds: range) -> None:
    for seed in seeds:
        case = random_case(seed)
        x, w, z_w = draw(case, bits, seed, centred=seed % 3 > 0)
        state, z_x = KERNELS[bits].prepare(w, z_w, case.geometry), random.Random(seed).randint(-128, 127)
        got = triton8.accumulate(x, torch.tensor(z_x), state)
        assert torch.equal(got.long(), truth(case, x, z_x, w, z_w)), f"seed {seed}: {case}"


def test_refusals_have_reasons() -> None:
    assert triton8.why_not(64, G()) is None
    assert "no multiple of 16" in (triton8.why_not(3, G()) or "")
    assert "no grouped form" in (triton8.why_not(64, G(groups=2)) or "")
