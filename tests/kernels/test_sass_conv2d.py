"""Machine code of every shipped tile of the Triton convolutions: integer tensor cores, no spill, shared memory and registers in bounds."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from sass import CAPABILITIES, Compiled, compile_for

from qdm_kernels.conv2d_w8a8.tiles import GROUP_M, TILES, Tile, register_cap
from qdm_kernels.conv2d_w8a8.triton import conv2d_kernel, finish_kernel

POINTERS = {
    "x_ptr": "*i8", "work_ptr": "*i32", "sums_ptr": "*i32", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "step_ptr": "*i32",
    "w_scale_ptr": "*fp32", "bias_ptr": "*fp32", "residual_ptr": "*bf16", "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32",
    "out_ptr": "*bf16",
}  # fmt: skip
SIZES = dict.fromkeys(("M", "N", "C", "H", "W", "OH", "OW", "BLOCKS", "BLOCKS_PER_SPLIT"), "i32")
ODD = ("M", "H", "W", "OH", "OW", "BLOCKS", "BLOCKS_PER_SPLIT")
GEOMETRY = {"KH": 3, "KW": 3, "SH": 1, "SW": 1, "PH": 1, "PW": 1, "DH": 1, "DW": 1}
FULL: dict[str, Any] = {
    "WIDE": False, "PER_IMAGE": False, "TABLES": 3, "HAS_BIAS": True, "HAS_RESIDUAL": True,
    "ACTIVATION": "none", "ASM": True, "EVEN_C": True, "SWAP": False, "SPLIT": False, "GROUP_M": GROUP_M,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "full": {},
    "split": {"SPLIT": True},
    "int8": {"HAS_RESIDUAL": False, "ACTIVATION": "silu", "TABLES": 15, "out_ptr": "*i8"},
    "1x1": {"KH": 1, "KW": 1, "PH": 0, "PW": 0},
    "stride 2": {"SH": 2, "SW": 2},
    "partial block": {"EVEN_C": False},
    "past 2^31": {"WIDE": True},
    "zero points": {"centre_ptr": "*i32", "x_sums_ptr": "*i32"},
}
FEW = {(128, 128, 64), (64, 64, 64)}  # (bm, bn, bk) of the tiles on which the other variants are compiled
WHOLE = os.environ.get("KERNEL_MATRIX") == "full"
MATRIX = [(t, c) for t in TILES for c in CAPABILITIES if c >= t.since]
CHANGED = [
    (t, name, bits, cap) for t in TILES if (t.bm, t.bn, t.bk) in FEW for name in VARIANTS if name != "full" for bits in (8, 4)
    for cap in CAPABILITIES
]  # fmt: skip


def compiled(tile: Tile, bits: int, capability: int, change: dict[str, Any]) -> Compiled:
    types = {**POINTERS, **SIZES, "w_ptr": "*i8" if bits == 8 else "*u8"} | {k: v for k, v in change.items() if k.endswith("_ptr")}
    fixed = GEOMETRY | FULL | {"BITS": bits, "SWAP": tile.swap, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    fixed |= {k: v for k, v in change.items() if not k.endswith("_ptr")}
    cap = register_cap(tile, fixed["KH"] * fixed["KW"], wide=fixed["WIDE"])
    return compile_for(conv2d_kernel, capability, types, fixed, warps=tile.warps, stages=tile.stages, odd=ODD, max_registers=cap)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("tile", "capability"), MATRIX if WHOLE else MATRIX[::2], ids=str)
def test_tiles(tile: Tile, capability: int, bits: int) -> None:
    compiled(tile, bits, capability, {}).check(registers=128 if tile.warps == 8 else 255)


@pytest.mark.slow
@pytest.mark.parametrize(("tile", "name", "bits", "capability"), CHANGED if WHOLE else CHANGED[::4] + CHANGED[-1:], ids=str)
def test_variants(tile: Tile, name: str, bits: int, capability: int) -> None:
    capped = register_cap(tile, taps=1 if name == "1x1" else 9, wide=name == "past 2^31") is not None
    compiled(tile, bits, capability, VARIANTS[name]).check(registers=128 if capped else 255)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_unpacking_permutes_no_bytes(capability: int) -> None:
    """Only the epilogue's casts may: with int32 sums out there is none."""
    assert compiled(TILES[1], 4, capability, {"SPLIT": True}).count(r"\bPRMT\b") == 0


def test_plain_unpacking_would_permute_bytes() -> None:
    assert compiled(TILES[1], 4, 80, {"SPLIT": True, "ASM": False}).count(r"\bPRMT\b") > 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("centre", [False, True], ids=["symmetric", "centre"])
def test_the_second_kernel_does_not_spill(centre: bool, capability: int) -> None:
    types = {**POINTERS, **dict.fromkeys(("M", "N", "H", "W", "OH", "OW", "SPLITS"), "i32")}
    types |= {"centre_ptr": "*i32", "x_sums_ptr": "*i32"} if centre else {}
    types.pop("x_ptr")
    keep = ("WIDE", "PER_IMAGE", "TABLES", "HAS_BIAS", "HAS_RESIDUAL", "ACTIVATION")
    fixed = GEOMETRY | {k: FULL[k] for k in keep} | {"BM": 32, "BN": 64}
    odd = ("M", "H", "W", "OH", "OW", "SPLITS")
    compile_for(finish_kernel, capability, types, fixed, warps=4, odd=odd).check(dot=None, copies=False, registers=128)
