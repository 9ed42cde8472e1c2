"""The host side of the Triton linear ops, compiled for GPUs that are not here: what the public calls launch is what was checked."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles", allow_module_level=True)

from launches import Launch, recorded

from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.gemm import tiles
from qdm_kernels.gemm.triton import row_sums_kernel
from qdm_kernels.layer_norm_quantize import triton as layer_norm
from qdm_kernels.linear_w4a16 import triton as weight_only
from qdm_kernels.linear_w8a8 import triton as linear
from qdm_kernels.quantize import triton as quantize

ONE, ZERO = torch.ones(1), torch.zeros(1, dtype=torch.int32)
STEP = torch.zeros(1, dtype=torch.int32)
GENERAL = mock.patch.object(tiles, "why_not_tma", lambda capability: "only the general kernels")  # test_sass_hopper.py has the others


def linear_launches(rows: list[int], n: int, k: int, *, bits: int = 8, zero: int = 0, capability: int = 90, **end: Any) -> list[Launch]:
    """Launches of a layer, one call per number of rows."""
    codes, table = torch.zeros((n, k), dtype=torch.int8), torch.ones(5)
    codes[0, 0] = (1 << bits - 1) - 1
    state = linear.prepare(codes, torch.full((n,), zero, dtype=torch.int32), bits)
    options = Epilogue(step=STEP, **({"out_dtype": torch.bfloat16} | end))
    gpu = mock.patch.object(tiles, "processors", lambda device: (capability, 108))
    with gpu, GENERAL, recorded(capability, linear.linear_kernel, linear.finish_kernel, row_sums_kernel) as launches:
        for m in rows:
            linear.linear(torch.zeros((m, k), dtype=torch.int8), table, ZERO, torch.ones(n), torch.ones(n), state, options)
    return launches


@pytest.mark.parametrize("bits", [8, 4])
def test_a_new_resolution_compiles_nothing(bits: int) -> None:
    """From 1025 to 2048 rows, multiples of 16 or not: one variant. K = 192 is an odd multiple of 64."""
    found = linear_launches([1025, 1040, 1536, 2048], 1280, 192, bits=bits)
    assert len({id(launch.variant) for launch in found}) == 1
    found[0].code.check(dot="int", registers=128)


@pytest.mark.parametrize("rows", [1, 17])
def test_few_rows_take_the_columns_and_still_reach_the_warp_group(rows: int) -> None:
    (launch,) = linear_launches([rows], 6912, 1152)
    assert launch.grid[0] == 6912 // 64
    launch.code.check(dot="int", registers=128)


def test_inputs_that_are_no_multiple_of_16_are_padded_and_keep_wide_copies() -> None:
    (launch,) = linear_launches([100], 64, 77)
    launch.code.check(dot="int")


def test_a_small_grid_is_split_along_k_and_finished_by_a_second_kernel() -> None:
    first, second = linear_launches([128], 1280, 5120)
    assert first.grid[1] > 1
    assert (first.kernel, second.kernel) == ("linear_kernel", "finish_kernel")
    second.code.check(dot=None, copies=False, registers=128)


def test_a_zero_point_that_int8_cannot_fold_takes_the_sums_of_the_rows() -> None:
    found = linear_launches([64], 320, 320, zero=-9)
    assert [launch.kernel for launch in found] == ["row_sums_kernel", "linear_kernel"]
    assert [launch.kernel for launch in linear_launches([64], 320, 320, zero=9)] == ["linear_kernel"]


@pytest.mark.parametrize("capability", [80, 89])
def test_older_tensor_cores(capability: int) -> None:
    (launch,) = linear_launches([4096], 640, 640, capability=capability, activation="gelu", residual=torch.zeros(4096, 640).half())
    launch.code.check(dot="int")


def test_an_input_off_its_boundary_is_copied() -> None:
    state = linear.prepare(torch.ones((64, 64), dtype=torch.int8), torch.zeros(64, dtype=torch.int32))
    x = torch.zeros(64 * 64 + 1, dtype=torch.int8)[1:].view(64, 64)
    with GENERAL, recorded(90, linear.linear_kernel, linear.finish_kernel) as launches:
        linear.accumulate(x, ZERO, state)
    launches[0].code.check(dot="int")


def test_quantizers() -> None:
    with recorded(90, quantize.quantize_kernel, quantize.per_token_kernel) as launches:
        for rows in (7, 64):
            quantize.quantize(torch.zeros(rows, 640, dtype=torch.bfloat16), torch.ones(9), ZERO, 8, STEP)
            quantize.quantize_per_token(torch.zeros(rows, 640, dtype=torch.bfloat16), 8)
    assert [launch.kernel for launch in launches] == ["quantize_kernel", "per_token_kernel"] * 2
    assert len({id(launch.variant) for launch in launches}) == 2
    for launch in launches[:2]:
        launch.code.check(dot=None, copies=False, registers=64)
        assert launch.code.count(r"\bLDG\.E\.128\b") > 0
        assert launch.code.count(r"\bSTG\.E\.(64|128)\b") > 0


@pytest.mark.parametrize(("k", "rows_at_once"), [(320, 8), (1280, 2), (3072, 1)])
def test_layer_norms_are_one_wave_at_any_resolution(k: int, rows_at_once: int) -> None:
    """16 warps of each of 132 multiprocessors at most; a new number of rows or samples compiles nothing."""
    with recorded(90, layer_norm.layer_norm_kernel) as launches:
        for samples, rows in ((1, 4608), (2, 4096), (1, 77), (3, 1), (1, 100_001)):
            x, m = torch.zeros(samples, rows, k, dtype=torch.bfloat16), torch.zeros(samples, k, dtype=torch.bfloat16)
            layer_norm.normalize_quantize(x, None, None, [m, m], None, 1e-6, torch.ones(9), ZERO, STEP, 8)
    assert len({id(launch.variant) for launch in launches}) == 1
    assert all(launch.grid[0] <= 132 * 4 for launch in launches)
    assert [launch.grid[0] for launch in launches[2:4]] == [-(-77 // rows_at_once), 3]
    launches[0].code.check(dot=None, copies=False, registers=128)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [None, 18])
def test_weight_only(groups: int | None, bits: int) -> None:
    shape = (6912,) if groups is None else (6912, groups)
    codes, zero = torch.zeros((6912, 1152), dtype=torch.int8), torch.zeros(shape, dtype=torch.int32)
    state = weight_only.prepare(codes, torch.ones(shape), zero, bits)
    with recorded(90, weight_only.linear_kernel) as launches:
        for m in (1, 2, 16):
            weight_only.linear(torch.zeros(m, 1152, dtype=torch.bfloat16), None, state, Epilogue(out_dtype=torch.bfloat16))
    assert len({id(launch.variant) for launch in launches}) == 1
    launches[0].code.check(dot="float", registers=128)
