"""Machine code of the producers: no spill, wide accesses, bytes written in words."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from sass import CAPABILITIES, compile_for

from qdm_kernels.gelu_quantize import triton as gelu
from qdm_kernels.gelu_quantize.triton import gelu_kernel
from qdm_kernels.group_norm_quantize import triton as group_norm
from qdm_kernels.group_norm_quantize.triton import apply_kernel, moments_kernel
from qdm_kernels.layer_norm_quantize import triton as layer_norm
from qdm_kernels.layer_norm_quantize.triton import layer_norm_kernel
from qdm_kernels.quantize import triton as quantize
from qdm_kernels.rms_norm_rotary.triton import rms_norm_rotary_kernel

SCALES = {"scale_ptr": "*fp32", "zero_ptr": "*i32", "step_ptr": "*i32", "out_ptr": "*i8", "x_ptr": "*bf16", "gain_ptr": "*fp32"}
CODES = {"TABLES": 3, "LOW": -128, "HIGH": 127, "HAS_GAIN": True, "GAIN_TABLE": True}
ROWS = {"ROWS": "i32", "K": "i32"}
SAMPLES = {"K": "i32", "ROWS_PER_SAMPLE": "i32", "COUNT": "i32", "EPS": "fp32"}
AFFINE = {"weight_ptr": "*bf16", "bias_ptr": "*bf16"}
MODULATION = {"m_ptr": "*bf16", "shift_ptr": "*bf16"}
IMAGE = {"mean_ptr": "*fp32", "m2_ptr": "*fp32", "PIXELS": "i32", "C": "i32", "GROUPS": "i32", "SEGMENT": "i32", "SEGMENTS": "i32"}
NORM = {"HAS_WEIGHT": True, "HAS_BIAS": True, "MODULATED": True, "SMALLEST": 1e-30} | CODES
GELU = {"GATED": True, "ACTIVATION": "gelu", "SMALLEST": 1e-30} | CODES
APPLY = {"HAS_WEIGHT": True, "HAS_BIAS": True, "ACTIVATION": "silu", "BS": 16, "BG": 32, "BP": 32, "BC": 128, "WIDTH": 10} | CODES
WIDTH_3072 = {"R": 1, "P": 1024, "PARTS": 3, "EVEN": True, "AHEAD": True}
ODD = ("ROWS", "ROWS_PER_SAMPLE", "COUNT", "GROUPS", "SEGMENTS", "PIXELS")

CASES: dict[str, tuple[Any, dict[str, str], dict[str, Any], int]] = {
    "layer norm 3072": (layer_norm_kernel, SAMPLES | AFFINE | MODULATION, NORM | {"DYNAMIC": False} | WIDTH_3072, 4),
    "layer norm 1152": (
        layer_norm_kernel, SAMPLES | AFFINE | MODULATION,
        NORM | {"DYNAMIC": False, "R": 2, "P": 512, "PARTS": 3, "EVEN": False, "AHEAD": True}, 4,
    ),
    "layer norm 16384": (
        layer_norm_kernel, SAMPLES | AFFINE | MODULATION | {"row_scale_ptr": "*fp32"},
        NORM | {"DYNAMIC": True, "R": 1, "P": 8192, "PARTS": 2, "EVEN": True, "AHEAD": False}, 16,
    ),
    "geglu static": (gelu_kernel, ROWS, GELU | {"DYNAMIC": False, "R": 2, "BLOCK": 1024}, 4),
    "geglu 16384": (gelu_kernel, ROWS | {"row_scale_ptr": "*fp32"}, GELU | {"DYNAMIC": True, "R": 1, "BLOCK": 16384}, 16),
    "group moments": (moments_kernel, IMAGE, {"WIDTH": 10, "BP": 128, "BC": 16}, 4),
    "group norm": (apply_kernel, IMAGE | AFFINE | {"EPS": "fp32"}, APPLY, 4),
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_producers(name: str, capability: int) -> None:
    kernel, types, fixed, warps = CASES[name]
    types = {k: v for k, v in (SCALES | types).items() if k in kernel.arg_names}
    code = compile_for(kernel, capability, types, fixed, warps=warps, odd=ODD)
    code.check(dot=None, copies=False, registers=255 if warps == 4 else 128)
    if "out_ptr" in types:
        assert code.count(r"\bSTG\.E\.(64|128)\b") > 0
        assert code.count(r"\bSTG\.E\.U8\b") == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_layer_norm_issues_little(capability: int) -> None:
    """Its time is that of its instructions: 16 warps of a multiprocessor hold their registers, and no entry costs a conversion."""
    types = {name: kind for name, kind in (SCALES | SAMPLES | MODULATION).items() if name != "gain_ptr"}
    fixed = NORM | WIDTH_3072 | {"HAS_WEIGHT": False, "HAS_BIAS": False, "HAS_GAIN": False, "GAIN_TABLE": False, "DYNAMIC": False}
    code = compile_for(layer_norm_kernel, capability, types, fixed, odd=ODD)
    code.check(dot=None, copies=False, registers=128)
    assert code.count(r"\bLDG\.E\.128\b") == code.count(r"\bLDG\.") - 3  # step, scale, zero point
    assert code.count(r"\bF2I\b") <= 2
    assert code.count(".") < 1000  # 24 entries of each thread, before the loop and in it


def test_counts_of_one() -> None:
    """A size of 1 is a constant to triton, unless a kernel says otherwise: one pixel, one group, one row, one entry."""
    from launches import recorded

    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    norms = group_norm.moments_kernel, group_norm.apply_kernel
    with recorded(
        90, *norms, layer_norm.layer_norm_kernel, gelu.gelu_kernel, quantize.quantize_kernel, quantize.per_token_kernel
    ) as launches:
        for shape, groups in (((1, 32, 1, 1), 32), ((1, 32, 1, 1), 1), ((1, 1, 1, 1), 1), ((2, 32, 5, 3), 1), ((1, 32, 40, 40), 4)):
            group_norm.normalize_quantize(torch.zeros(shape), groups, None, None, None, 1e-5, "silu", one, zero, None, 8)
        layer_norm.normalize_quantize(torch.zeros(1, 1), None, None, [one[None], one[None]], one, 1e-5, one, zero, None, 8)
        layer_norm.normalize_quantize(torch.zeros(1, 1), None, None, [], None, 1e-5, None, None, None, 8)
        for gated in (False, True):
            gelu.activate_quantize(torch.zeros(1, 1 + gated), gated, "none", one, one, zero, None, 8)
            gelu.activate_quantize(torch.zeros(1, 1 + gated), gated, "none", None, None, None, None, 8)
        quantize.quantize(torch.zeros(1), one, zero, 8, None)
        quantize.quantize_per_token(torch.zeros(1, 1), 8)
    assert len(launches) == 18


HEADS = {"TOKENS": "i32", "TOTAL": "i32", "AT": "i32", "SAMPLE_STRIDE": "i32", "TOKEN_STRIDE": "i32", "EPS": "fp32"}
TURNS = {"cos_ptr": "*fp32", "sin_ptr": "*fp32"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("width", "dtype", "values"), [(128, "bf16", True), (128, "bf16", False), (96, "fp16", True), (64, "fp32", True)], ids=str
)
def test_heads_of_queries_and_keys(width: int, dtype: str, values: bool, capability: int) -> None:
    """16 bytes at a time, but for the weights; no detour through shared memory between lines of a head."""
    names = [f"{one}{end}_ptr" for one in "qkv"[: 2 + values] for end in ("", "_out")] + ["q_weight_ptr", "k_weight_ptr"]
    block = 128 if width == 96 else width
    fixed = {"HEADS": 24, "D": width, "Q_WEIGHT": True, "K_WEIGHT": True, "HB": 8, "BT": 1024 // block, "BLOCK": block, "OVERLAP": False}
    types = HEADS | TURNS | dict.fromkeys(names, f"*{dtype}")
    code = compile_for(rms_norm_rotary_kernel, capability, types, fixed, odd=("TOKENS", "TOTAL", "AT"))
    code.check(dot=None, copies=False, registers=64)
    assert code.count(r"\bSTG\.E\.128\b") == code.count(r"\bSTG\.") > 0
    assert code.count(r"\bLDG\.") - code.count(r"\bLDG\.E\.128\b") <= 2
    assert code.count(r"\bBAR\.SYNC\b") <= 2
