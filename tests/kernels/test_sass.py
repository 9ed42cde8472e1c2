"""The compile-only harness tells good machine code from bad."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

import triton
import triton.language as tl
from sass import CAPABILITIES, SHARED_LIMIT, Compiled, compile_for

TYPES = {"x": "*i8", "w": "*i8", "y": "*i32", "m": "i32", "n": "i32", "k": "i32"}
TILE = {"BM": 64, "BN": 64, "BK": 64, "PACKED_ALONG_K": True}


@triton.jit
def product(x, w, y, m, n, k, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PACKED_ALONG_K: tl.constexpr):
    rm, rn, rk = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    sum_ = tl.zeros((BM, BN), tl.int32)
    at_x = rm[:, None] * k + rk[None, :]
    at_w = rn[None, :] * k + rk[:, None] if PACKED_ALONG_K else rn[None, :] + rk[:, None] * n
    for start in range(0, k, BK):
        a = tl.load(x + at_x, mask=(rm[:, None] < m) & (start + rk[None, :] < k), other=0)
        b = tl.load(w + at_w, mask=(rn[None, :] < n) & (start + rk[:, None] < k), other=0)
        sum_ = tl.dot(a, b, sum_, out_dtype=tl.int32)
        at_x += BK
        at_w += BK if PACKED_ALONG_K else BK * n
    tl.store(y + rm[:, None] * n + rn[None, :], sum_, mask=(rm[:, None] < m) & (rn[None, :] < n))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_good_kernel_has_no_faults(capability: int) -> None:
    code = compile_for(product, capability, TYPES, TILE, odd=("m", "n"))
    assert code.faults(registers=200) == []
    assert 0 < code.registers < 200
    assert 0 < code.shared < SHARED_LIMIT[capability]


def test_an_unaligned_row_length_is_found() -> None:
    code = compile_for(product, 90, TYPES, TILE, odd=("k",))
    assert [fault for fault in code.faults() if "byte stores" in fault]


def test_weights_packed_along_n_are_found() -> None:
    code = compile_for(product, 90, TYPES, {**TILE, "PACKED_ALONG_K": False})
    assert code.count(r"\bSTS\b") or code.count(r"\bPRMT\b") > 16


def test_too_few_registers_spill_and_too_much_shared_memory_is_found() -> None:
    tile = {**TILE, "BM": 128, "BN": 128, "BK": 128}
    capped = compile_for(product, 80, TYPES, tile, warps=4, max_registers=64)
    assert [fault for fault in capped.faults() if "spills" in fault]
    deep = compile_for(product, 89, TYPES, tile, warps=8, stages=5)
    assert [fault for fault in deep.faults() if "shared memory" in fault]


def test_a_missing_instruction_and_a_register_bound_are_found() -> None:
    code = Compiled(90, 4, "        /*0000*/   IADD3 R1, R2, R3, RZ ;\n", registers=140, stack=0, shared=0)
    assert code.faults(registers=128) == [r"no IGMMA\.\w+\.S8\.S8", "no asynchronous 16-byte copy", "140 registers, 128 wanted"]
    assert code.faults(dot=None, copies=False) == []


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(AssertionError, match="no argument"):
        compile_for(product, 90, {**TYPES, "z": "i32"}, TILE)
