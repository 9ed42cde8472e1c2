"""Integer layers on a real GPU: sums equal float64 truth, outputs equal the reference bit for bit, runs and batch positions agree.

Everywhere else these tests are skipped. On a machine with several cores: `pytest -n 12 tests/kernels/gpu`, so that variants compile side by
side. Outputs are poisoned by tests/conftest.py: an element that nobody wrote is no valid sum.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import GEOMETRIES, ConvCase, LinearCase, conv_cases, linear_cases
from torch import Tensor

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from qdm_kernels.conv2d_w4a8 import op as conv4
from qdm_kernels.conv2d_w8a8 import op as conv8
from qdm_kernels.conv2d_w8a8 import triton as conv_triton
from qdm_kernels.gemm.tiles import TMA_TILES, Plan, Tile
from qdm_kernels.layout import padded_length
from qdm_kernels.linear_w4a8 import op as linear4
from qdm_kernels.linear_w8a8 import op as linear8
from qdm_kernels.linear_w8a8 import triton as linear_triton

LINEAR, CONV = {8: linear8, 4: linear4}, {8: conv8, 4: conv4}
pytestmark = pytest.mark.gpu
GPU = "cuda"
SHARDS = 4  # what one worker compiles, another need not wait for
COUNT = 200
SCALES = torch.tensor([0.011, 0.02, 0.5])
ZEROS = torch.tensor([3, -128, 90], dtype=torch.int32)


def integers(z: int) -> Tensor:
    return torch.tensor([z], dtype=torch.int32, device=GPU)


def prepare(case: LinearCase | ConvCase, w: Tensor, z_w: Tensor, backend: str) -> Any:
    n, rng = len(w), torch.Generator().manual_seed(case.seed)
    parts = w, torch.rand(n, generator=rng).to(GPU) * 1e-3, z_w, torch.randn(n, generator=rng).to(GPU)
    if isinstance(case, LinearCase):
        return LINEAR[case.bits].prepare(*parts, backend=backend)
    g = case.geometry
    keys = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "padding_end": g.padding_end}
    return CONV[case.bits].prepare(*parts, **keys, backend=backend)


def run(case: LinearCase | ConvCase, *args: Any, **keys: Any) -> Tensor:
    return (linear8.linear if isinstance(case, LinearCase) else conv8.conv2d)(*args, **keys)


def accumulate(case: LinearCase | ConvCase, *args: Any) -> Tensor:
    return (linear8 if isinstance(case, LinearCase) else conv8).accumulate(*args)


def check_sums(case: LinearCase | ConvCase) -> None:
    x, w, z_w = case.draw(GPU)
    got, want = accumulate(case, x, integers(case.z_x), prepare(case, w, z_w, "triton")), case.truth(x, w, z_w)
    assert got.dtype == torch.int32
    assert torch.equal(got, want), f"{case}: {int((got != want).sum())} of {want.numel()} sums differ"


def check_output(case: LinearCase | ConvCase) -> None:
    """float32, which every backend rounds alike."""
    x, w, z_w = case.draw(GPU)
    layer, plain = (prepare(case, w, z_w, name) for name in ("triton", "reference"))
    args = x, torch.tensor(0.013, device=GPU), integers(case.z_x)
    assert torch.equal(run(case, *args, layer), run(case, *args, plain)), f"{case}: outputs differ"


@pytest.mark.parametrize("shard", range(SHARDS))
@pytest.mark.parametrize("bits", [8, 4])
def test_linear_on_random_shapes(bits: int, shard: int) -> None:
    for case in linear_cases(COUNT, bits)[shard::SHARDS]:
        check_sums(case)


@pytest.mark.parametrize("geometry", range(len(GEOMETRIES)))
@pytest.mark.parametrize("bits", [8, 4])
def test_convolutions_on_random_shapes(bits: int, geometry: int) -> None:
    """One worker per kernel side and stride, which are constants of the machine code."""
    for case in conv_cases(COUNT, bits, channels=(16, 64, 192))[geometry :: len(GEOMETRIES)]:
        check_sums(case)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="needs capability 9.0")
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", TMA_TILES[:5], ids=str)
def test_the_copy_engine_on_odd_shapes(tile: Tile, bits: int) -> None:
    """Tails of rows, outputs and inputs; one share and three; images that no box divides."""
    for splits in (1, 3):
        for m, n, k in ((300, 136, 320), (1, 8, 64), (129, 320, 1152), (257, 65, 192)):
            case = LinearCase(m, n, k, bits, 9, True, False, m)
            x, w, z_w = case.draw(GPU)
            if padded_length(k) % tile.bk == 0:
                state = linear_triton.prepare(w, z_w, bits)
                got = linear_triton.launch(x, integers(9), state, torch.int32, plan=Plan(tile, splits))
                assert torch.equal(got, case.truth(x, w, z_w)), (m, n, k, splits)
    for shape, filters in (((2, 128, 8, 8), 72), ((3, 128, 13, 20), 136)):
        conv = ConvCase(shape, filters, (3, 3), GEOMETRIES[0][1], bits, 9, True, False, 3)
        x, w, z_w = conv.draw(GPU)
        state = conv_triton.prepare(w, z_w, conv.geometry, bits)
        got = conv_triton.launch(x, integers(9), state, torch.int32, plan=Plan(tile))
        assert torch.equal(got, conv.truth(x, w, z_w)), shape


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("z_w", [0, 3])
def test_gated_outputs(z_w: int, bits: int) -> None:
    """[value, gate] -> value * gelu(gate) as float32 of the reference, and its codes within a tie; tiles that end inside the values."""
    for m, n, k in ((300, 136, 320), (1, 64, 64), (2048, 2560, 320), (129, 330, 1152), (40, 10240, 1280)):
        case = LinearCase(m, n, k, bits, 9, z_w == 0, False, m)
        x, w, zero = case.draw(GPU)
        fast, plain = (prepare(case, w, zero, name) for name in ("triton", "reference"))
        args = x, torch.tensor(0.013, device=GPU), integers(case.z_x)
        want = run(case, *args, plain, activation="geglu")
        got = run(case, *args, fast, activation="geglu")
        assert torch.allclose(got, want, rtol=1e-5, atol=1e-5), (m, n, k)
        scale, z = torch.tensor([float(want.abs().max()) / 100], device=GPU), integers(-7)
        codes = run(case, *args, fast, activation="geglu", out_dtype=torch.int8, out_scale=scale, out_zero_point=z)
        exact = want.double() / scale.double() - 7
        assert ((codes.double() - exact.clamp(-128, 127)).abs() <= 0.5 + 1e-3).all(), (m, n, k)


LARGE = [
    LinearCase(2048, 1280, 1280, 8, 9, True, False, 1),
    LinearCase(2048, 1280, 1280, 4, 9, True, False, 1),
    LinearCase(4608, 3072, 15360, 8, -128, True, False, 2),
    LinearCase(512, 1152, 4608, 4, 0, False, False, 3),
    LinearCase(128, 960, 960, 8, 7, True, False, 4),
    LinearCase(8192, 320, 320, 8, 7, True, False, 5),
]


def same_padding(batch: int, channels: int, side: int, filters: int, bits: int) -> ConvCase:
    kernel, geometry = (3, 3), conv_cases(1, bits)[0].geometry
    return ConvCase((batch, channels, side, side), filters, kernel, geometry, bits, 5, True, False, side)


LARGE_CONVS = [
    same_padding(2, 320, 64, 320, 8), same_padding(2, 640, 32, 640, 4), same_padding(2, 1280, 16, 1280, 8),
    same_padding(2, 1280, 8, 1280, 4), same_padding(2, 192, 64, 192, 8),
]  # fmt: skip


@pytest.mark.parametrize("case", [*LARGE, *LARGE_CONVS], ids=str)
def test_layers_of_real_models(case: LinearCase | ConvCase) -> None:
    check_output(case)


@pytest.mark.parametrize("case", [LARGE[0], LARGE_CONVS[3]], ids=str)
@pytest.mark.parametrize("epilogue", ["bf16", "silu residual", "gelu", "int8"])
def test_epilogues(case: LinearCase | ConvCase, epilogue: str) -> None:
    """Casts and codes follow from the float32 output; activations stand within two steps of float64."""
    x, w, z_w = case.draw(GPU)
    layer = prepare(case, w, z_w, "triton")
    args = x, torch.tensor(2e-3, device=GPU), integers(case.z_x), layer
    y = run(case, *args).double()
    residual = torch.randn(y.shape, device=GPU, dtype=torch.float16)
    if epilogue == "bf16":
        assert torch.equal(run(case, *args, out_dtype=torch.bfloat16), y.bfloat16())
    elif epilogue == "int8":
        scale, zero = torch.tensor([0.03], device=GPU), integers(-7)
        got = run(case, *args, out_dtype=torch.int8, out_scale=scale, out_zero_point=zero)
        want = torch.round((y.float() * scale.reciprocal()).clamp(-121, 134)) - 7
        assert torch.equal(got.float(), want)
    elif epilogue == "gelu":
        got = run(case, *args, activation="gelu", out_dtype=torch.float32).double()
        assert ((got - torch.nn.functional.gelu(y)).abs() <= 4e-7 * (1 + y.abs())).all()
    else:
        got = run(case, *args, activation="silu", residual=residual, out_dtype=torch.float16).double()
        want = torch.nn.functional.silu(y) + residual.double()
        assert ((got - want).abs() <= 2**-10 * (want.abs() + 1e-3) + 1e-6 * (1 + y.abs())).all()


STEP_CASES = [LinearCase(130, 96, 320, 8, 0, False, False, 1), same_padding(1, 64, 9, 48, 8), LARGE_CONVS[3]]


@pytest.mark.parametrize("case", STEP_CASES, ids=str)
def test_one_graph_serves_every_step(case: LinearCase | ConvCase) -> None:
    """The step lives on the device: one capture, and each of its replays equals the eager call of that step, and another step differs."""
    x, w, z_w = case.draw(GPU)
    layer, step = prepare(case, w, z_w, "triton"), integers(0)
    scales, zeros = SCALES.to(GPU), ZEROS.to(GPU)

    def call(row: Tensor) -> Tensor:
        keys = {"out_dtype": torch.int8, "out_scale": scales * 9, "out_zero_point": zeros}
        return run(case, x, scales, zeros, layer, step=row, **keys)

    eager = [call(integers(i)) for i in range(3)]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(step)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(step)
    for i in (2, 0, 1, 1):
        step.fill_(i)
        out.fill_(77)
        graph.replay()
        assert torch.equal(out, eager[i]), f"step {i}"
    assert not torch.equal(eager[0], eager[1])


@pytest.mark.parametrize("case", [LARGE[0], LARGE[3], LARGE_CONVS[2], LARGE_CONVS[3]], ids=str)
def test_twenty_runs_give_the_same_bits(case: LinearCase | ConvCase) -> None:
    x, w, z_w = case.draw(GPU)
    layer = prepare(case, w, z_w, "triton")
    args = x, torch.tensor(0.013, device=GPU), integers(case.z_x), layer
    first = run(case, *args)
    for _ in range(20):
        assert torch.equal(run(case, *args), first)


@pytest.mark.parametrize("case", [LARGE[0], LARGE_CONVS[0]], ids=str)
def test_two_ranges_are_two_layers_and_a_residual(case: LinearCase | ConvCase) -> None:
    x, w, z_w = case.draw(GPU)
    layer, scale = prepare(case, w, z_w, "triton"), torch.tensor(2e-3, device=GPU)
    second = run(case, torch.roll(x, 1, 0), scale * 7, integers(-7), layer)
    args = x, scale, integers(case.z_x), layer
    assert torch.equal(run(case, *args, residual=second), run(case, *args) + second)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_image_is_the_same_alone_and_in_a_batch(bits: int) -> None:
    """Other sizes get other tiles and splits; the bits are those of the integers."""
    conv = same_padding(4, 128, 12, 96, bits)
    x, w, z_w = conv.draw(GPU)
    layer, scale, zero = prepare(conv, w, z_w, "triton"), torch.tensor(0.013, device=GPU), integers(5)
    whole = conv8.conv2d(x, scale, zero, layer)
    for i in range(4):
        assert torch.equal(conv8.conv2d(x[i : i + 1], scale, zero, layer)[0], whole[i])
    linear = LinearCase(512, 640, 2560, bits, 5, True, False, 3)
    x, w, z_w = linear.draw(GPU)
    layer = prepare(linear, w, z_w, "triton")
    whole = linear8.linear(x, scale, zero, layer)
    for rows in (slice(0, 128), slice(384, 512), slice(500, 501)):
        assert torch.equal(linear8.linear(x[rows], scale, zero, layer), whole[rows])


def test_views_and_odd_addresses() -> None:
    """Channels first, transposed, a slice off its 16-byte boundary, an empty batch, scales left on the CPU: right, if slower."""
    case = LARGE[4]
    x, w, z_w = case.draw(GPU)
    layer, want = prepare(case, w, z_w, "triton"), case.truth(x, w, z_w)
    zero = integers(case.z_x)
    assert torch.equal(linear8.accumulate(x.T.contiguous().T, zero, layer), want)
    shifted = torch.empty(x.numel() + 1, dtype=torch.int8, device=GPU)[1:].view_as(x).copy_(x)
    assert torch.equal(linear8.accumulate(shifted, zero, layer), want)
    assert linear8.linear(x[:0], torch.ones((), device=GPU), zero, layer).shape == (0, case.outputs)
    there, here = (linear8.linear(x, torch.tensor(0.5, device=d), zero.to(d), layer) for d in (GPU, "cpu"))
    assert torch.equal(there, here)
    conv = same_padding(2, 64, 9, 33, 8)
    x, w, z_w = conv.draw(GPU)
    layer, want = prepare(conv, w, z_w, "triton"), conv.truth(x, w, z_w)
    for view in (x.contiguous(), x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, 64:]):
        assert torch.equal(conv8.accumulate(view, integers(5), layer), want)
    assert conv8.conv2d(x[:0], torch.ones((), device=GPU), integers(5), layer).shape == (0, 33, 9, 9)
    there, here = (conv8.conv2d(x, torch.tensor(0.5, device=d), integers(5).to(d), layer) for d in (GPU, "cpu"))
    assert torch.equal(there, here)
