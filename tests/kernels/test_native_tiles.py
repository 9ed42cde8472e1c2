"""Products in AMX tiles, AVX512-VNNI and AVX2: exact sums, the contract's outputs bit for bit, whatever the shape, the cut, the threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from producers import check_codes, gelu
from torch import Tensor

from qdm_kernels.conv2d_w8a8 import cpu as conv2d_cpu
from qdm_kernels.conv2d_w8a8 import op as conv2d_op
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.native import producers as producers_native
from qdm_kernels.native import tiles
from qdm_kernels.native.producers import Grid
from qdm_kernels.onednn import to_unsigned
from qdm_kernels.quantize import reference

pytestmark = pytest.mark.skipif(tiles.why_not() is not None, reason=str(tiles.why_not()))
SHAPES = [(1, 64, 1), (31, 128, 33), (32, 64, 32), (33, 320, 96), (65, 192, 320), (257, 1280, 48), (0, 64, 8), (4101, 64, 160)]


@pytest.fixture(autouse=True, params=[(1, 32_768), (2, 32_768), (3, 2048)], ids=["1 thread", "2 threads", "3 threads, small cuts"])
def cut(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    torch.set_num_threads(request.param[0])
    monkeypatch.setattr(tiles, "FIRST_LEVEL", request.param[1])
    monkeypatch.setattr(tiles, "SMALLEST", 0)


def vectors(n: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(3)
    return torch.rand(n, generator=rng) * 1e-3, torch.randn(n, generator=rng)


@pytest.mark.parametrize("z", [0, -128, 127])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_product(draw, m: int, k: int, n: int, z: int) -> None:
    x, w, (scale, bias) = draw((m, k)), draw((n, k)), vectors(n)
    packed, sums = tiles.pack(w), (x.double() - z) @ w.double().T
    made = torch.full((m, n), 77, dtype=torch.int32)
    assert torch.equal(tiles.product(x, z, packed, scale, None, made).double(), sums)
    rows, more = torch.rand(m), torch.randn(m, n)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((m, n), torch.nan, dtype=dtype)
        assert torch.equal(tiles.product(x, z, packed, scale, bias, out), (sums.float() * scale + bias).to(dtype))
        residual = more.to(dtype)
        want = (sums.float() * (rows[:, None] * scale) + residual.float()).to(dtype)
        got = tiles.product(x, z, packed, scale, None, torch.full_like(out, torch.nan), row_scale=rows, residual=residual)
        if m >= tiles.SIDE or dtype == torch.float32:
            assert torch.equal(got, want)
        else:  # few rows are rounded before the residual is added
            assert torch.allclose(got.float(), want.float(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(("bits", "zero_points"), [(8, (-90, 90)), (4, (-8, 7)), (4, (0, 0)), (5, (-16, 15))])
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_weights_with_zero_points(draw, m: int, k: int, n: int, bits: int, zero_points: tuple[int, int]) -> None:
    """Where weights minus their zero points do not fit into bytes, the sums of the inputs are taken off."""
    x, w, (scale, bias) = draw((m, k)), draw((n, k), -(1 << bits - 1), (1 << bits - 1) - 1), vectors(n)
    zero = torch.randint(zero_points[0], zero_points[1] + 1, (n,), dtype=torch.int32)
    packed, sums = tiles.pack(w, zero), (x.double() - 7) @ (w.double() - zero[:, None]).T
    assert torch.equal(tiles.product(x, 7, packed, scale, None, torch.full((m, n), 77, dtype=torch.int32)).double(), sums)
    for dtype in (torch.float32, torch.bfloat16):
        out = torch.full((m, n), torch.nan, dtype=dtype)
        assert torch.equal(tiles.product(x, 7, packed, scale, bias, out), (sums.float() * scale + bias).to(dtype))


@pytest.mark.parametrize(("weight", "zero"), [(-128, 127), (127, -128), (-8, 7), (-16, 0), (15, 0), (127, 0)])
def test_extremes_of_inputs_and_weights(weight: int, zero: int) -> None:
    w = torch.full((40, 1024), weight, dtype=torch.int8)
    packed = tiles.pack(w, torch.full((40,), zero, dtype=torch.int32))
    for value in (-128, 127):
        x = torch.full((7, 1024), value, dtype=torch.int8)
        assert (
            tiles.product(x, 0, packed, torch.ones(40), None, torch.empty((7, 40), dtype=torch.int32)) == value * (weight - zero) * 1024
        ).all()


@pytest.mark.parametrize("value", [-128, 127])
def test_extremes(value: int) -> None:
    x, w = torch.full((40, 4096), value, dtype=torch.int8), torch.full((5, 4096), -128, dtype=torch.int8)
    out = torch.empty((40, 5), dtype=torch.int32)
    assert (tiles.product(x, 127, tiles.pack(w), torch.ones(5), None, out) == (value - 127) * -128 * 4096).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize(("m", "inner"), [(3, 16), (100, 80), (33, 160)])
def test_gated(draw, m: int, inner: int, dtype: torch.dtype) -> None:
    x, w, (scale, bias) = draw((m, 64)), draw((2 * inner, 64)), vectors(2 * inner)
    gain, grid = 2 ** torch.randn(inner), Grid(1 / 0.05, 9)
    inter = [tiles.interleave(t) for t in (scale, bias)]
    out = torch.zeros((m, inner), dtype=dtype)
    tiles.product(x, 3, tiles.pack(tiles.interleave(w)), *inter, out, gain=gain, grid=grid)
    y = ((x.double() - 3) @ w.double().T).float() * scale + bias
    codes = out if dtype == torch.int8 else (out.int() - 128).to(torch.int8)
    check_codes(codes, gelu(y, True, "none", gain), torch.tensor(0.05), 9)


CONVOLUTIONS = [
    ((2, 64, 5, 7), (40, 3, 3), {"padding": (1, 1)}),
    ((3, 128, 16, 16), (33, 3, 3), {"padding": (1, 1)}),
    ((2, 64, 9, 8), (32, 3, 3), {"padding": (2, 2), "dilation": (2, 2)}),
    ((1, 64, 12, 40), (16, 5, 3), {"padding": (2, 1)}),
    ((2, 64, 8, 6), (24, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    ((2, 64, 8, 6), (24, 3, 3), {"padding": (0, 0), "padding_end": (1, 1), "stride": (2, 2)}),
    ((2, 64, 7, 7), (24, 3, 3), {"padding": (0, 1), "padding_end": (2, 0)}),
    ((1, 64, 3, 3), (8, 3, 3), {"padding": (1, 1)}),
    ((2, 64, 20, 18), (24, 3, 3), {"padding": (1, 1), "stride": (2, 2)}),
    ((1, 64, 33, 131), (40, 3, 3), {"padding": (0, 0), "padding_end": (1, 1), "stride": (2, 2)}),
    ((2, 128, 25, 30), (16, 5, 3), {"padding": (2, 1), "stride": (3, 3)}),
    ((2, 64, 17, 30), (16, 1, 1), {"stride": (2, 2)}),
    ((2, 192, 6, 5), (50, 1, 1), {}),
    ((1, 64, 1, 16), (2, 1, 1), {"stride": (2, 2)}),
    ((0, 64, 8, 8), (8, 3, 3), {"padding": (1, 1)}),
]


@pytest.mark.parametrize("far", [0, 100], ids=["centred", "zero points"])
@pytest.mark.parametrize(("shape", "kernel", "keys"), CONVOLUTIONS, ids=str)
def test_convolution(draw, shape: tuple[int, ...], kernel: tuple[int, ...], keys: dict, far: int) -> None:
    w, x = draw((kernel[0], shape[1], *kernel[1:])), draw(shape).contiguous(memory_format=torch.channels_last)
    scale, bias = vectors(kernel[0])
    zero = torch.randint(-far, far + 1, (kernel[0],), dtype=torch.int32)
    layers = [conv2d_op.prepare(w, scale, zero, bias, **keys, backend=name) for name in ("cpu", "reference")]
    transformed = kernel[1:] == (3, 3) and "stride" not in keys and "dilation" not in keys and tiles.kind() == "avx2"
    assert layers[0].strategy == (tiles.WINOGRAD if transformed else tiles.kind())
    images = torch.rand(shape[0], 1, 1, 1)
    for z in (torch.tensor(0), torch.tensor(-77)):
        sums = [conv2d_op.accumulate(x, z, layer) for layer in layers]
        assert torch.equal(*sums)
        if layers[0].reads_unsigned:
            assert torch.equal(
                conv2d_op.conv2d(to_unsigned(x), torch.tensor(0.3), z, layers[0]), conv2d_op.conv2d(x, torch.tensor(0.3), z, layers[1])
            )
        for x_scale in (torch.tensor(0.3), images):
            assert torch.equal(*(conv2d_op.conv2d(x, x_scale, z, layer) for layer in layers))
        more = torch.randn(sums[0].shape)
        for dtype in (torch.float32, torch.bfloat16):
            end = {"residual": more.to(dtype), "out_dtype": dtype}
            a, b = (conv2d_op.conv2d(x, torch.tensor(0.3), z, layer, **end) for layer in layers)
            assert torch.allclose(
                a.float(), b.float(), rtol=1e-6 if dtype == torch.float32 else 2e-2, atol=1e-6 if dtype == torch.float32 else 2e-2
            )
            assert a.numel() == 0 or a.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("height", "width"), [(12, 1), (40, 1), (7, 6), (33, 9)])
@pytest.mark.parametrize("filters", [32, 1280])
def test_images_in_parts_smaller_than_a_block(draw, height: int, width: int, filters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows stay in the cache, and whether weights or images are the larger load. Stride (2, 2) is not transformed anywhere."""
    monkeypatch.setattr(tiles, "CACHED", 1)
    w, x = draw((filters, 64, 3, 3)), draw((3, 64, height, width)).contiguous(memory_format=torch.channels_last)
    (scale, bias), zero = vectors(filters), torch.zeros(filters, dtype=torch.int32)
    for stride in ((1, 1), (2, 2)):
        keys = {"stride": stride, "padding": (1, 1)}
        layers = [conv2d_op.prepare(w, scale, zero, bias, **keys, backend=name) for name in ("cpu", "reference")]
        assert torch.equal(*(conv2d_op.accumulate(x, torch.tensor(9), layer) for layer in layers))


@pytest.mark.skipif(tiles.kind() != "avx2", reason="3x3 convolutions are transformed in AVX2 alone")
@pytest.mark.parametrize("channels", [16, 48, 224])
def test_few_channels_are_transformed_too(draw, channels: int) -> None:
    w, (scale, bias) = draw((24, channels, 3, 3)), vectors(24)
    zero, pad = torch.randint(-60, 60, (24,), dtype=torch.int32), {"padding": (1, 1)}
    layers = [conv2d_op.prepare(w, scale, zero, bias, **pad, backend=name) for name in ("cpu", "reference")]
    assert layers[0].strategy == tiles.WINOGRAD
    x = draw((2, channels, 9, 13)).contiguous(memory_format=torch.channels_last)
    assert torch.equal(*(conv2d_op.conv2d(x, torch.tensor(0.1), torch.tensor(-9), layer) for layer in layers))
    floats, grid = torch.randn(x.shape).contiguous(memory_format=torch.channels_last), Grid(1 / 0.05, 9)
    affine, codes = producers_native.group_affine(floats, 4, None, None, None, 1e-5), torch.empty_like(x)
    producers_native.affine_codes(floats, affine, None, True, codes, grid)
    want = conv2d_op.conv2d(codes, torch.tensor(1.0), torch.tensor(9), layers[0])
    assert torch.equal(conv2d_cpu.from_floats(floats, tiles.Source(grid, affine, True, None), scale, bias, layers[0].state), want)


@pytest.mark.skipif(tiles.kind() != "avx2", reason="3x3 convolutions are transformed in AVX2 alone")
def test_transformed_extremes() -> None:
    for code, zero in ((-128, 127), (127, -128)):
        w = torch.full((5, 64, 3, 3), code, dtype=torch.int8)
        w[1:, ::2] = -code - 1
        layers = [conv2d_op.prepare(w, torch.ones(5), torch.full((5,), zero), None, backend=name) for name in ("cpu", "reference")]
        assert layers[0].strategy == tiles.WINOGRAD
        for value in (-128, 127):
            x = torch.full((1, 64, 7, 8), value, dtype=torch.int8)
            x[..., ::2] = -value - 1
            assert torch.equal(*(conv2d_op.accumulate(x, torch.tensor(3), layer) for layer in layers))


@pytest.mark.skipif(tiles.kind() != "avx2", reason="3x3 convolutions are transformed in AVX2 alone")
def test_weights_too_large_to_be_transformed() -> None:
    """Four times a sum would pass int32."""
    w = torch.full((1, 3712, 3, 3), 127, dtype=torch.int8)
    layers = [conv2d_op.prepare(w, torch.ones(1), torch.zeros(1, dtype=torch.int32), None, backend=name) for name in ("cpu", "reference")]
    assert layers[0].strategy == "avx2"
    x = torch.full((1, 3712, 8, 8), -128, dtype=torch.int8)
    assert torch.equal(*(conv2d_op.accumulate(x, torch.tensor(0), layer) for layer in layers))


def test_parts_are_equal() -> None:
    assert [tiles._equal(count, 488, 48) for count in (30, 480, 481, 512, 2048)] == [480, 480, 288, 288, 432]


def test_what_tiles_do_not_take(draw) -> None:
    zero = torch.zeros(8, dtype=torch.int32)
    assert linear_op.prepare(draw((8, 72)), torch.ones(8), zero, None, backend="cpu").strategy not in tiles.STRATEGIES
    assert linear_op.prepare(draw((8, 64)), torch.ones(8), zero + 120, None, backend="cpu").strategy == tiles.kind()
    grouped = conv2d_op.prepare(draw((8, 64, 3, 3)), torch.ones(8), zero, None, groups=2, backend="cpu")
    assert grouped.strategy not in tiles.STRATEGIES


def test_onednn_finds_its_tiles_again(draw) -> None:
    """Its products in bfloat16, before and after ours, in turns."""
    x, w, (scale, bias) = draw((70, 128)), draw((48, 128)), vectors(48)
    a, b = torch.randn(90, 256).bfloat16(), torch.randn(64, 256).bfloat16()
    first = F.linear(a, b)
    for _ in range(3):
        tiles.product(x, 1, tiles.pack(w), scale, bias, torch.empty(70, 48))
        assert torch.equal(F.linear(a, b), first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [3, 70, 300])
def test_floats_become_the_codes_of_the_contract(draw, m: int, dtype: torch.dtype) -> None:
    """A layer on floats has the bits of the layer on their codes."""
    x, w, (scale, bias) = (3 * torch.randn(m, 128)).to(dtype), draw((40, 128)), vectors(40)
    x[0, :3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    packed, step = tiles.pack(w), torch.tensor(0.04)
    grid, codes = Grid(float(step.reciprocal()), -11), reference.quantize(x, step, torch.tensor(-11), 8)
    want = tiles.product(codes, -11, packed, scale, bias, torch.empty(m, 40))
    assert torch.equal(tiles.product(x, -11, packed, scale, bias, torch.empty(m, 40), source=tiles.Source(grid)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_norm_on_the_way_writes_the_codes_of_the_producer(draw, kernel: int, stride: int, dtype: torch.dtype) -> None:
    x = (2 * torch.randn(3, 64, 18, 15) + 1).to(dtype).contiguous(memory_format=torch.channels_last)
    w, (scale, bias), gain = draw((24, 64, kernel, kernel)), vectors(24), 2 ** torch.randn(64)
    pad = (kernel // 2, kernel // 2)
    layer = conv2d_op.prepare(w, scale, torch.zeros(24, dtype=torch.int32), bias, stride=(stride, stride), padding=pad, backend="cpu")
    grid, affine = Grid(1 / 0.05, 9), producers_native.group_affine(x, 8, None, None, None, 1e-5)
    codes = torch.empty_like(x, dtype=torch.int8)
    producers_native.affine_codes(x, affine, gain, True, codes, grid)
    want = conv2d_op.conv2d(codes, torch.tensor(1.0), torch.tensor(9), layer, out_dtype=dtype)
    assert conv2d_cpu.reads_floats(layer.state, x)
    got = conv2d_cpu.from_floats(x, tiles.Source(grid, affine, True, gain), scale, bias, layer.state)
    assert got.dtype == dtype
    assert torch.equal(got, want)
