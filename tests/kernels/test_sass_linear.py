"""Machine code of the shipped configurations of linear layers and quantizers (kernels.md 8.7). KERNEL_MATRIX=full: all on all GPUs."""

from __future__ import annotations

import os
from typing import Any

import pytest

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from sass import CAPABILITIES, Compiled, compile_for

from qdm_kernels.gemm.tiles import GROUP_M, SHARED_BYTES, TILES, WEIGHT_ONLY_TILES, Tile
from qdm_kernels.linear_w4a16 import triton as weight_only
from qdm_kernels.linear_w8a8 import triton as linear
from qdm_kernels.quantize import triton as quantize

FULL = os.environ.get("KERNEL_MATRIX") == "full"
POINTERS = {
    "sums_ptr": "*i32", "x_scale_ptr": "*fp32", "x_zero_ptr": "*i32", "step_ptr": "*i32", "w_scale_ptr": "*fp32", "bias_ptr": "*fp32",
    "out_ptr": "*bf16",
}  # fmt: skip
FLAGS = {
    "WIDE": False, "PER_ROW": False, "TABLES": 3, "HAS_BIAS": True, "HAS_RESIDUAL": False, "ACTIVATION": "none", "ASM": True,
    "EVEN_K": True, "SPLIT": False, "GROUP_M": GROUP_M,
}  # fmt: skip
EPILOGUES: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "plain": ({}, {}),
    "gelu residual": ({"residual_ptr": "*bf16"}, {"HAS_RESIDUAL": True, "ACTIVATION": "gelu"}),
    "int8": ({"out_ptr": "*i8", "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32"}, {"TABLES": 15, "ACTIVATION": "gelu_tanh"}),
    "per row": ({}, {"PER_ROW": True, "TABLES": 0}),
    "share": ({"work_ptr": "*i32"}, {"SPLIT": True}),
    "odd inputs": ({}, {"EVEN_K": False}),
    "zero points": ({"centre_ptr": "*i32", "x_sums_ptr": "*i32"}, {}),
    "gated": ({"out_ptr": "*i8", "out_scale_ptr": "*fp32", "out_zero_ptr": "*i32"}, {"TABLES": 15, "ACTIVATION": "geglu"}),
}


def compiled(tile: Tile, bits: int, capability: int, epilogue: str = "plain") -> Compiled:
    types, flags = EPILOGUES[epilogue]
    sizes = dict.fromkeys(("M", "N", "K", "BLOCKS", "BLOCKS_PER_SPLIT"), "i32")
    signature = {"x_ptr": "*i8", "w_ptr": "*i8" if bits == 8 else "*u8", **POINTERS, **types, **sizes}
    constants = {**FLAGS, **flags, "BITS": bits, "SWAP": tile.swap, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    odd = ("M", "BLOCKS", "BLOCKS_PER_SPLIT")
    return compile_for(
        linear.linear_kernel, capability, signature, constants, warps=tile.warps, stages=tile.stages, odd=odd, max_registers=tile.registers
    )


def wanted(tile: Tile, capability: int) -> dict[str, Any]:
    """Eight warps keep 128 registers and four warps 255, so that two programs share a multiprocessor; none spills."""
    return {"dot": "int", "registers": 128 if tile.warps == 8 else 255}


def matrix() -> list[tuple[Tile, int, int]]:
    """Every tile on sm_90, every second one elsewhere; with KERNEL_MATRIX=full all."""
    whole = [(tile, bits, cap) for cap in CAPABILITIES for tile in TILES for bits in (8, 4) if cap >= tile.since]
    return whole if FULL else [item for i, item in enumerate(whole) if (item[2] == 90 and item[1] == 8) or i % 5 == 0]


@pytest.mark.parametrize(("tile", "bits", "capability"), matrix(), ids=lambda v: str(v))
def test_shipped_tiles(tile: Tile, bits: int, capability: int) -> None:
    code = compiled(tile, bits, capability)
    code.check(**wanted(tile, capability))
    assert code.count(r"\bFFMA\b") == 0, "a contracted multiply-add rounds once where the contract rounds twice"
    if bits == 4 and not tile.swap:
        assert code.count(r"\bPRMT\b") == 0, "nibbles go from bytes to operands without byte permutes"
    assert tile.shared_bytes <= SHARED_BYTES[capability]


CORNERS = (TILES[0], TILES[2], TILES[7])
ENDS = [(tile, bits, end) for tile in (CORNERS if FULL else CORNERS[:1]) for bits in ((8, 4) if FULL else (8,)) for end in EPILOGUES]


@pytest.mark.parametrize(("tile", "bits", "epilogue"), ENDS, ids=lambda v: str(v))
def test_epilogues_do_not_spill(tile: Tile, bits: int, epilogue: str) -> None:
    compiled(tile, bits, 90, epilogue).check(**wanted(tile, 90))


def test_two_instructions_unpack_four_weights() -> None:
    """The plain form, kept for the interpreter, takes many more."""
    tile, sizes = TILES[1], dict.fromkeys(("M", "N", "K", "BLOCKS", "BLOCKS_PER_SPLIT"), "i32")
    constants = {**FLAGS, "BITS": 4, "SWAP": False, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk, "ASM": False}
    signature = {"x_ptr": "*i8", "w_ptr": "*u8", **POINTERS, **sizes}
    plain = compile_for(linear.linear_kernel, 80, signature, constants, warps=8, stages=4)
    assert plain.count(r"\b(PRMT|LOP3|SHF)\b") > 2 * compiled(tile, 4, 80).count(r"\b(PRMT|LOP3|SHF)\b")


@pytest.mark.parametrize("capability", CAPABILITIES if FULL else (90,))
@pytest.mark.parametrize("dtype", ["*fp32", "*bf16"])
def test_quantizers_read_and_write_wide(capability: int, dtype: str) -> None:
    types = {"x_ptr": dtype, "scale_ptr": "*fp32", "zero_ptr": "*i32", "step_ptr": "*i32", "out_ptr": "*i8", "COUNT": "i32"}
    constants = {"TABLES": 3, "LOW": -128, "HIGH": 127, "WIDE": False, "BLOCK": 4096}
    code = compile_for(quantize.quantize_kernel, capability, types, constants, warps=8)
    code.check(dot=None, copies=False, registers=64)
    assert code.count(r"LDG\.E\.128")
    assert code.count(r"STG\.E\.(64|128)")
    types = {"x_ptr": dtype, "scale_ptr": "*fp32", "out_ptr": "*i8", "K": "i32"}
    constants = {"SMALLEST": 1e-30, "LOW": -128, "HIGH": 127, "BLOCK": 4096}
    code = compile_for(quantize.per_token_kernel, capability, types, constants, warps=8)
    code.check(dot=None, copies=False, registers=128)
    assert code.count(r"LDG\.E\.128")


def weight_only_matrix() -> list[tuple[Tile, str, int, int]]:
    """Tile, type, blocks per group and capability: three in ten, with KERNEL_MATRIX=full all."""
    kinds = [(kind, group) for kind in ("bf16", "fp16") for group in (0, 1)]
    whole = [(tile, kind, group, cap) for cap in CAPABILITIES for tile in WEIGHT_ONLY_TILES for kind, group in kinds]
    return whole if FULL else whole[::11]


@pytest.mark.parametrize(("tile", "kind", "group", "capability"), weight_only_matrix(), ids=lambda v: str(v))
def test_weight_only_tiles(tile: Tile, kind: str, group: int, capability: int) -> None:
    sizes = dict.fromkeys(("M", "N", "K", "BLOCKS", "GROUPS"), "i32")
    types = {"x_ptr": f"*{kind}", "w_ptr": "*i16", "scale_ptr": "*fp32", "zero_ptr": "*i8", "bias_ptr": "*fp32", "out_ptr": f"*{kind}"}
    constants = {"WIDE": False, "HAS_BIAS": True, "HAS_RESIDUAL": False, "ACTIVATION": "silu", "EVEN_K": True, "GROUP_M": GROUP_M}
    constants |= {"KIND": kind, "BITS": 4, "BLOCKS_PER_GROUP": group, "BM": tile.bm, "BN": tile.bn, "BK": tile.bk}
    options = {"warps": tile.warps, "stages": tile.stages, "max_registers": tile.registers, "odd": ("M", "BLOCKS", "GROUPS")}
    code = compile_for(weight_only.linear_kernel, capability, types | sizes, constants, **options)
    code.check(dot="float", registers=255)
    assert code.count("I2F") <= 16, "zero points are converted, nibbles become floats by their bits"
