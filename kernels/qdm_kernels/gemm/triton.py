"""What the Triton matrix products share: cheap launches, order of the tiles, unpacking of 4-bit codes."""

from __future__ import annotations

import os
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from qdm_kernels.direct.triton import Boxes, Grid, Heads, Variant
from qdm_kernels.gemm import tiles

_WHOLE_ROW = 16_384  # codes that a program which sums rows reads at once: 128 bytes of a thread
T = TypeVar("T")
_variants: dict[Hashable, Variant] = {}


class Call:
    """A launch but for its tensors, which come first: what a layer keeps of a size that it has met. No multiply-add is contracted.

    Args:
        key: everything the machine code depends on: device, constants, options, and dtype, presence and alignment of every tensor.
        rest: arguments after the tensors.
        boxes: makes the descriptors that stand for the first tensors; None = there are none.
    """

    __slots__ = ("_boxes", "_grid", "_heads", "_rest", "_variant")

    def __init__(
        self, fn: Any, grid: Grid, key: tuple[Hashable, ...], rest: tuple[Any, ...], options: dict[str, Any], boxes: Boxes | None = None
    ) -> None:
        variant = _variants.get(key)
        if variant is None:
            variant = _variants[key] = Variant(fn, options)
        self._variant, self._grid, self._rest, self._boxes = variant, grid, rest, boxes
        self._heads: Heads = {}

    def __call__(self, *tensors: Tensor | None) -> None:
        self._variant.launch(self._grid, tensors, self._rest, self._boxes, self._heads)


@dataclass(frozen=True)
class Product:
    """The launches of a matrix product of one size.

    finish: adds the shares of K; None = the product is finished where it is computed. shares: their shape, [splits, M, N].
    """

    multiply: Call
    finish: Call | None
    shares: tuple[int, int, int]

    def __call__(self, x: Tensor, weight: Tensor, pointers: tuple[Tensor | None, ...]) -> None:
        if self.finish is None:
            self.multiply(x, weight, None, *pointers)
            return
        work = torch.empty(self.shares, dtype=torch.int32, device=x.device)
        self.multiply(x, weight, work, *pointers)
        self.finish(work, *pointers)


class Ready(dict[Hashable, T]):
    """What was made ready for the sizes and types that were met, by all that decides about it. most: kept at a time."""

    def __init__(self, most: int = 64) -> None:
        super().__init__()
        self._most = most

    def keep(self, key: Hashable, made: T) -> T:
        """Remember `made`, and forget the others where there are too many; returns it."""
        if len(self) >= self._most:
            self.clear()
        self[key] = made
        return made


class Weights:
    """What the states of packed weights have in common. weight: codes, a row or filter per output; sums, centre: as there."""

    weight: Tensor
    sums: Tensor
    centre: Tensor | None

    @cached_property
    def bits(self) -> int:
        """Of a code."""
        return 4 if self.weight.dtype == torch.uint8 else 8

    @cached_property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0]

    @cached_property
    def ready(self) -> Ready[Product]:
        """Launches for the sizes that were met."""
        return Ready()

    @cached_property
    def sums_ready(self) -> Ready[Call]:
        """The same of sums of inputs."""
        return Ready()


def variant(*arguments: Any) -> tuple[Hashable, ...]:
    """Of each argument, what triton specialises a kernel for: a tensor's dtype and 16-byte alignment, an integer's divisibility by 16."""
    found: list[Hashable] = []
    for one in arguments:
        if isinstance(one, Tensor):
            found.append((one.dtype, one.data_ptr() % 16 == 0))
        else:
            found.append((one % 16 == 0, one == 1, one >= 1 << 31) if isinstance(one, int) else one is None)
    return tuple(found)


def kinds(*tensors: Tensor | None) -> tuple[Hashable, ...]:
    """Of each tensor, what a variant depends on where alignment is not specialised: its dtype; None = it is absent."""
    return tuple([None if t is None else t.dtype for t in tensors])


def tensors_of(tensors: tuple[Tensor | None, ...]) -> tuple[Hashable, ...]:
    """As `variant` of tensors alone, in a quarter of its time where all are aligned."""
    bits = 0
    for one in tensors:
        if one is not None:
            bits |= one.data_ptr()
    return variant(*tensors) if bits & 15 else kinds(*tensors)


def overlaps(device: torch.device) -> bool:
    """Whether kernels may start while the one before them drains (programmatic dependent launch), as capability 9.0 and later do.

    QDM_OVERLAP=0, read once, turns it off.
    """
    return COMPILED and tiles.processors(device)[0] >= 90 and _overlap_wanted()


@cache
def _overlap_wanted() -> bool:
    return os.environ.get("QDM_OVERLAP") != "0"


@triton.jit
def follow():
    """Waits until the kernels before this one have written their results, and lets the one after it start early, up to the same point."""
    tl.inline_asm_elementwise("griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise("griddepcontrol.launch_dependents; // $0", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


def scalar_on(t: Tensor | None, device: torch.device) -> Tensor | None:
    """A scale, zero point or table where the kernel reads it: one left on the CPU would be an invalid address."""
    if t is None or (t.get_device() == (-1 if device.index is None else device.index) and t.is_contiguous()):
        return t
    return t.to(device).contiguous()


@triton.jit
def tile_of(M, N, BM: tl.constexpr, BN: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column of this program's tile; GROUP_M row tiles share a column of weights while it is in L2."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    rows = tl.minimum(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % rows, inside // rows


@triton.jit
def without_centre(acc, offs_m, offs_n, m_ok, n_ok, centre_ptr, x_sums_ptr):
    """Sums less z_w times what each of their rows read of x, where weights kept their zero points."""
    if centre_ptr is not None:
        x_sums = tl.load(x_sums_ptr + offs_m, mask=m_ok, other=0)
        acc -= x_sums[:, None] * tl.load(centre_ptr + offs_n, mask=n_ok, other=0)[None, :]
    return acc


COMPILED = isinstance(tile_of, triton.JITFunction)  # False under the interpreter, which has no inline assembly


@triton.jit
def plane_offsets(WIDTH: tl.constexpr, BITS: tl.constexpr):
    """Inputs that WIDTH stored bytes stand for: themselves, or with 4 bits those of the low nibbles; the high ones come 32 later."""
    j = tl.arange(0, WIDTH)
    return j if BITS == 8 else (j // 32) * 64 + j % 32


@triton.jit
def multiply(x, w, acc, SWAP: tl.constexpr):
    """acc + x w^T, or its transpose: x [BM, k], w [BN, k] int8."""
    if SWAP:
        acc = tl.dot(w, x.T, acc, out_dtype=tl.int32)
    else:
        acc = tl.dot(x, w.T, acc, out_dtype=tl.int32)
    return acc


@triton.jit
def unpack_low(packed, ASM: tl.constexpr):
    """16 * the low nibble, signed: uint8 -> int8. ASM: four bytes by two instructions; the interpreter takes the plain form."""
    if ASM:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; shl.b32 t, $1, 4; and.b32 $0, t, 0xF0F0F0F0; }", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4
        )
    return (packed << 4).to(tl.int8, bitcast=True)


@triton.jit
def unpack_high(packed, ASM: tl.constexpr):
    """16 * the high nibble, signed: uint8 -> int8."""
    if ASM:
        return tl.inline_asm_elementwise("and.b32 $0, $1, 0xF0F0F0F0;", "=r,r", [packed], dtype=tl.int8, is_pure=True, pack=4)
    return (packed & 0xF0).to(tl.int8, bitcast=True)


@triton.jit(do_not_specialize=["ROWS"])
def row_sums_kernel(
    x_ptr, out_ptr, ROWS, K, R: tl.constexpr, BLOCK: tl.constexpr, ONCE: tl.constexpr, OVERLAP: tl.constexpr
):  # fmt: skip
    """Sums of R rows of codes: x int8 [ROWS, K] -> int32 [ROWS]. ONCE: BLOCK covers a row, and all of it is under way at once."""
    if OVERLAP:
        follow()
    rows, k = tl.program_id(0) * R + tl.arange(0, R), tl.arange(0, BLOCK)
    row_ok, x_tile = rows < ROWS, x_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    total = tl.load(x_tile, mask=row_ok[:, None] & (k < K)[None, :], other=0).to(tl.int32)
    if not ONCE:
        for start in range(BLOCK, K, BLOCK):
            total += tl.load(x_tile + start, mask=row_ok[:, None] & (start + k < K)[None, :], other=0).to(tl.int32)
    tl.store(out_ptr + rows, tl.sum(total, axis=1), mask=row_ok)


def sums_of(x: Tensor, state: Weights) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sums of the weights, their zero points, and the sums of the last axis of x, which those are multiplied with: None = none are left."""
    if state.centre is None:
        return state.sums, None, None
    k, sums = x.shape[-1], torch.empty(x.shape[:-1], dtype=torch.int32, device=x.device)
    call = state.sums_ready.get(sums.numel())
    if call is None:
        whole, overlap, rows = max(16, 1 << (k - 1).bit_length()), overlaps(x.device), sums.numel()
        block = whole if whole <= _WHOLE_ROW else 4096
        at_once = min(16, _WHOLE_ROW // block) if whole <= _WHOLE_ROW else 1
        constants = (at_once, block, whole <= _WHOLE_ROW, overlap)
        call = Call(
            row_sums_kernel, (tiles.cdiv(rows, at_once), 1, 1), ("row sums", x.device.index, variant(x, sums, k), constants),
            (rows, k, *constants), {"num_warps": 4, "launch_pdl": overlap},
        )  # fmt: skip
        state.sums_ready.keep(sums.numel(), call)
    call(x, sums)
    return state.sums, state.centre, sums
