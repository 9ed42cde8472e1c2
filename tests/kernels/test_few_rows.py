"""Weight-only layers of few rows: words are stored as the kernel's algebra expects them; its machine code only reads and multiplies.

The interpreter has no Gluon: what the kernel does to words and inputs is repeated here with torch's operators; `gpu/test_gemm.py` runs it.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles", allow_module_level=True)

from launches import recorded

from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.few_rows import triton as few
from qdm_kernels.gemm.tiles import FEW_ROWS_TILES, few_rows_tile
from qdm_kernels.linear_w4a16 import op, reference
from qdm_kernels.linear_w4a16 import triton as kernels

CPU = torch.device("cpu")
FORMATS = [(4, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16), (8, torch.float16)]


def codes_of(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(-(1 << bits - 1), 1 << bits - 1, (n, k), generator=torch.Generator().manual_seed(n + k), dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("n", "k", "group"), [(1, 1, 0), (16, 64, 0), (40, 1152, 0), (33, 320, 64), (7, 384, 128), (100, 200, 0)])
def test_words_hold_every_code(n: int, k: int, group: int, bits: int) -> None:
    codes, groups = codes_of(n, k, bits), (n, k // group) if group else (n,)
    state = kernels.prepare(codes, torch.ones(groups), torch.zeros(groups, dtype=torch.int32), bits, few_rows=True)
    assert state.words.dtype == torch.int32
    assert state.words.shape[0] == -(-n // 16)
    assert state.words.shape[1] * few.block_inputs(bits) % state.chunk == 0
    assert torch.equal(kernels.codes_of(state), codes)


def test_golden_words() -> None:
    """Lane 0 holds inputs 0 to 15 of output 0 first: nibbles of word 0 are inputs 0, 4, 8, 12, then 1, 5, 9, 13."""
    codes = torch.zeros((16, 64), dtype=torch.int8)
    codes[0, [0, 4, 8, 12, 1, 5, 9, 13]] = torch.tensor([-8, -7, -6, -5, -4, -3, -2, -1], dtype=torch.int8)
    words = few.pack(codes, 4, 64)
    assert words.shape == (1, 1, 128)
    assert words[0, 0, 0].item() & 0xFFFFFFFF == 0x76543210
    assert {word & 0xFFFFFFFF for word in words[0, 0, 1:].tolist()} == {0x88888888}


@pytest.mark.parametrize("bits", [4, 8])
def test_chunks(bits: int) -> None:
    """Four blocks where few inputs are stored in vain, a group of scales where there are groups."""
    assert few.chunk_inputs(3072, bits, 0) == 4 * few.block_inputs(bits)
    assert few.chunk_inputs(few.block_inputs(bits), bits, 0) == few.block_inputs(bits)
    assert few.chunk_inputs(3072, bits, 64) == 64


def operand(words: Tensor, zero: Tensor, bits: int, dtype: torch.dtype) -> list[Tensor]:
    """Planes of the left operand [16 tiles, K / planes], by the bit arithmetic of `_unpacking`."""
    halves = torch.stack([words.to(torch.int16), (words >> 16).to(torch.int16)], -1)
    w = halves.view(len(words), -1, 8, 4, 2, 2, 2).permute(0, 5, 2, 1, 4, 3, 6).reshape(16 * len(words), -1).to(torch.int32) & 0xFFFF
    magic = 0x4300 if dtype == torch.bfloat16 else 0x6400
    offset = -(zero.float() + few._offset_of_zero.fn(bits, "bf16" if dtype == torch.bfloat16 else "fp16")).to(dtype)[:, None]

    def number(pattern: Tensor) -> Tensor:
        return pattern.to(torch.int16).view(dtype)

    planes = []
    for p in range(16 // bits):
        shifted = w >> bits * p
        if bits == 4:
            value = number(shifted & 0xF | magic)
        elif dtype == torch.float16:
            value = number(shifted & 0xFF ^ 0x6480)
        else:
            value = number(shifted & 0x7F | magic) - number(shifted & 0x80 | magic)
        planes.append(value + offset)
    return planes


@pytest.mark.parametrize(("bits", "dtype"), FORMATS)
def test_the_algebra_of_the_kernel(bits: int, dtype: torch.dtype) -> None:
    """Codes minus zero points are exact in the operand's type, and meet their inputs."""
    n, k, m, low = 33, 320, 5, -(1 << bits - 1)
    codes, rng = codes_of(n, k, bits), torch.Generator().manual_seed(3)
    zero = torch.randint(low, -low, (n,), generator=rng, dtype=torch.int8)
    state = kernels.prepare(codes, torch.ones(n), zero, bits, few_rows=True)
    blocks = state.words.shape[1]
    x = torch.zeros(m, blocks * few.block_inputs(bits), dtype=dtype)
    x[:, :k] = torch.randn(m, k, generator=rng).to(dtype)
    rows = x.view(m, blocks, 4, 16 // bits, 2, 2).permute(1, 4, 2, 5, 0, 3).reshape(16 * blocks, m, -1)
    padded = torch.zeros(48, dtype=torch.int8)
    padded[:n] = zero
    got = sum(w.double() @ rows[..., p].double() for p, w in enumerate(operand(state.words, padded, bits, dtype)))
    assert torch.equal(got[:n].T, x[:, :k].double() @ (codes.double() - zero.double()[:, None]).T)


CODES = [(m, groups, bits, dtype, cap) for cap in (80, 89, 90) for bits, dtype in FORMATS for m, groups in ((1, None), (12, 3))]


@pytest.mark.parametrize(("m", "groups", "bits", "dtype", "capability"), CODES if os.environ.get("KERNEL_MATRIX") == "full" else CODES[::5])
def test_machine_code(m: int, groups: int | None, bits: int, dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores, 16-byte loads straight into registers: no shared memory, no exchange between lanes, no spill, no repacking."""
    n, k = 6912, 64 * groups if groups else 1152
    shape = (n,) if groups is None else (n, groups)
    state = kernels.prepare(codes_of(n, k, bits), torch.ones(shape), torch.zeros(shape, dtype=torch.int8), bits, few_rows=True)
    monkeypatch.setattr(few, "overlaps", lambda device: capability >= 90)
    with recorded(capability, few.few_rows_kernel) as launches:
        kernels.linear(torch.zeros((m, k), dtype=dtype), torch.zeros(n), state, Epilogue("silu", None, dtype))
    (launch,) = launches
    assert launch.grid[1] == -(-m // few.COLUMNS)
    code = launch.code
    code.check(dot=None, copies=False, registers=few._REGISTERS)
    assert code.count(r"\bHMMA\.16816\.F32") >= 16 // bits
    assert code.count(r"\bLDG\.E.*\.128\b") >= 4
    assert code.shared == 0
    assert code.count(r"\b(SHFL|STS|LDS)\b") == 0
    assert code.count(r"\bPRMT\b") <= 16


def test_tiles() -> None:
    """As many warps as leave two programs to every one of 132 multiprocessors."""
    assert [few_rows_tile(n, 1152, CPU, 4).warps for n in (64, 4608, 9216, 18432)] == [1, 1, 2, 4]
    assert {tile.bn for tile in FEW_ROWS_TILES} == {16 * tile.warps for tile in FEW_ROWS_TILES}


def test_the_op_keeps_what_it_multiplies() -> None:
    """float32 rows, which tensor cores would round, meet dequantized weights; other backends do not mind the wish."""
    codes, scale, zero = codes_of(40, 128, 4), torch.rand(40), torch.zeros(40, dtype=torch.int32)
    x, state = torch.randn(3, 128), kernels.prepare(codes, scale, zero, few_rows=True)
    want = x.double() @ reference.dequantize(codes, scale, zero, torch.float64).T
    assert torch.allclose(kernels.linear(x, None, state, Epilogue()).double(), want, rtol=1e-5, atol=1e-5)
    assert op.prepare(codes, scale, zero, None, backend="cpu", few_rows=True).backend == "cpu"
