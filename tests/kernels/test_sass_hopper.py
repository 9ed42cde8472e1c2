"""The kernels of `hopper` compile to integer products, copies by the engine and no spill; their boxes of pixels cover the image."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles", allow_module_level=True)

from launches import recorded

from qdm_kernels.conv2d_w8a8 import triton as conv
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.gemm.tiles import TMA_TILES, Plan, Tile, bucket, runs, why_not_tma
from qdm_kernels.gemm.triton import row_sums_kernel
from qdm_kernels.geometry import Conv2dGeometry
from qdm_kernels.hopper import triton as hopper
from qdm_kernels.linear_w8a8 import triton as linear

ZERO, ONE = torch.zeros(1, dtype=torch.int32), torch.ones(1)
END = Epilogue(out_dtype=torch.bfloat16, step=ZERO)
FULL = os.environ.get("KERNEL_MATRIX") == "full"
CASES = [(tile, bits) for tile in TMA_TILES for bits in (8, 4)]


@pytest.mark.parametrize(("tile", "bits"), CASES if FULL else CASES[::5], ids=str)
def test_linear(tile: Tile, bits: int) -> None:
    state = linear.prepare(torch.zeros((320, 384), dtype=torch.int8), torch.zeros(320, dtype=torch.int32), bits)
    x = torch.zeros((300, 384), dtype=torch.int8)
    with recorded(90, hopper.linear_kernel, linear.finish_kernel) as launches:
        for splits in (1, 2):
            linear.launch(x, ZERO, state, torch.bfloat16, x_scale=ONE, w_scale=torch.ones(320), end=END, plan=Plan(tile, splits))
    assert [launch.kernel for launch in launches] == ["linear_kernel", "linear_kernel", "finish_kernel"]
    for launch in launches[:2]:
        launch.code.check(dot="int", registers=tile.registers)
        assert launch.code.count("UTMALDG") >= 2
        assert launch.code.count(r"\bPRMT\b") <= 40


@pytest.mark.parametrize(("tile", "bits"), CASES if FULL else (CASES[0], CASES[11], CASES[-1]), ids=str)
def test_gated_linear(tile: Tile, bits: int) -> None:
    """Values and gates are two boxes of one tile; nothing spills, with zero points of weights neither, and codes leave in words."""
    codes, zero = torch.zeros((640, 384), dtype=torch.int8), torch.full((640,), (1 << bits - 1) - 1, dtype=torch.int32)
    codes[0] = -(1 << bits - 1)
    state, end = linear.prepare(codes, zero, bits), Epilogue("geglu", None, torch.int8, ONE, ZERO, ZERO)
    with recorded(90, hopper.linear_kernel, row_sums_kernel) as launches:
        x = torch.zeros((300, 384), dtype=torch.int8)
        linear.launch(x, ZERO, state, torch.int8, x_scale=ONE, w_scale=torch.ones(640), end=end, plan=Plan(tile))
    sums, product = launches
    sums.code.check(dot=None, copies=False, registers=64)
    assert product.grid == (-(-300 // tile.bm) * (-(-640 // tile.bn)), 1, 1)
    product.code.check(dot="int", registers=tile.registers)
    assert product.code.count("UTMALDG") >= 3
    assert product.code.count(r"\bSTG\.E\.U8\b") == 0


@pytest.mark.parametrize("zero", [False, True], ids=["symmetric", "zero points"])
@pytest.mark.parametrize("bits", [8, 4])
def test_convolution(bits: int, zero: bool) -> None:
    codes = torch.full((192, 192, 3, 3), -(1 << bits - 1), dtype=torch.int8)
    points = torch.full((192,), int(zero), dtype=torch.int32)
    state = conv.prepare(codes, points, Conv2dGeometry(padding=(1, 1)), bits)
    tile = next(t for t in TMA_TILES if t.bk == 64)
    before = ["row_sums_kernel", "window_sums_kernel"] if zero else []
    with recorded(90, hopper.conv2d_kernel, conv.finish_kernel, conv.window_sums_kernel, row_sums_kernel) as launches:
        x = torch.zeros((2, 192, 16, 16), dtype=torch.int8)
        conv.launch(x, ZERO, state, torch.bfloat16, x_scale=ONE, w_scale=torch.ones(192, 1, 1), end=END, plan=Plan(tile))
    assert [launch.kernel for launch in launches] == [*before, "conv2d_kernel"]
    assert launches[-1].grid == (4 * -(-192 // tile.bn), 1, 1)
    launches[-1].code.check(dot="int", registers=tile.registers)
    assert launches[-1].code.count("UTMALDG") >= 2


@pytest.mark.parametrize("shape", [(1, 64, 1, 1), (3, 64, 1, 1), (1, 64, 1, 7), (2, 64, 5, 1)], ids=str)
def test_axes_of_one_entry_have_strides_of_any_size(shape: tuple[int, ...]) -> None:
    """An image of one pixel is channels last with strides of 1, which the copy engine refuses; so are rows cut out of more."""
    tile, no_zeros = next(t for t in TMA_TILES if t.bk == 64), torch.zeros(64, dtype=torch.int32)
    state = conv.prepare(torch.zeros((64, 64, 3, 3), dtype=torch.int8), no_zeros, Conv2dGeometry(padding=(1, 1)))
    matrix = linear.prepare(torch.zeros((64, 64), dtype=torch.int8), no_zeros)
    x = torch.zeros(shape, dtype=torch.int8)
    with recorded(90, hopper.conv2d_kernel, hopper.linear_kernel) as launches:
        for one in (x, x.contiguous(memory_format=torch.channels_last), torch.cat([x, x], 1)[:, :64]):
            conv.launch(one, ZERO, state, torch.int32, plan=Plan(tile))
        linear.launch(torch.zeros(65, dtype=torch.int8)[:64].as_strided((1, 64), (7, 1)), ZERO, matrix, torch.int32, plan=Plan(tile))
    assert [launch.kernel for launch in launches] == ["conv2d_kernel"] * 3 + ["linear_kernel"]


@pytest.mark.parametrize("size", [(2, 64, 64), (2, 8, 8), (1, 24, 24), (3, 13, 20), (1, 1, 1)])
@pytest.mark.parametrize("rows", [64, 128, 256])
def test_boxes(rows: int, size: tuple[int, int, int]) -> None:
    images, height, width = hopper.box_of(rows, size)
    assert images * height * width == rows
    if size == (2, 64, 64):
        assert (images, height, width) == (1, rows // 64, 64)


def test_only_capability_9_0_runs_them() -> None:
    assert why_not_tma(90) is None
    assert "9.0" in (why_not_tma(80) or "")
    assert "9.0" in (why_not_tma(100) or "")
    assert not any(runs(tile, 89) for tile in TMA_TILES)
    assert bucket(300) == 512
