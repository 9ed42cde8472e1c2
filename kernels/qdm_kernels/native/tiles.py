"""`tiles.cpp` and `vectors.cpp` on tensors: products of codes in AMX tiles, else in AVX512-VNNI."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.native.build import library
from qdm_kernels.native.producers import Grid
from qdm_kernels.onednn import to_unsigned

KINDS = {"amx": "tiles", "vnni": "vectors"}  # what multiplies, best first, and the file that does
_CAPS = {"amx": ("AMX", "DEFAULT", "ALL"), "vnni": ("AMX", "DEFAULT", "ALL", "VNNI", "BF16", "FP16", "AVX10")}  # of oneDNN, that allow it
SIDE, STEP = 32, 64  # rows and outputs of a block; codes that one tile instruction sums
CACHED, FIRST_LEVEL = 1_250_000, 32_768  # bytes of codes that stay while weights pass by: in the second-level cache, in the first
SMALLEST = 4_000_000  # multiply-adds below which a second thread costs more than it saves
_KINDS, _CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}, 3
_SOURCES = {torch.int8: 0, torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("x", "weight", "offsets", "shift", "scale", "bias", "row_scale", "residual", "out", "gain")),
        *((name, _P) for name in ("factor", "offset", "x_gain")),
        *((name, _L) for name in ("images", "rows", "pitch", "steps", "outputs", "channels", "stride", "line", "valid")),
        *((name, _L) for name in ("height", "width", "top", "left", "reach", "chunk")),
        *((name, _I) for name in ("x_kind", "x_silu")),
        ("x_inverse", ctypes.c_float),
        *((name, _I) for name in ("x_zero", "x_bits", "kind")),
        ("inverse", ctypes.c_float),
        *((name, _I) for name in ("zero", "bits", "flip", "x_flip", "threads")),
    ]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, K] in panels. row_sums: int32 [N]; a gated one has its two halves interleaved, and so have its vectors."""

    weight: Tensor
    row_sums: Tensor
    outputs: int
    terms: int


@dataclass(frozen=True)
class Source:
    """How a float input becomes codes: those of silu(x * factor + offset) * gain. factor, offset: float32 [B, C] of an image; gain: [K]."""

    grid: Grid
    affine: tuple[Tensor, Tensor] | None = None
    silu: bool = False
    gain: Tensor | None = None


@cache
def why_not() -> str | None:
    """Why codes are not multiplied here; None = they are."""
    return None if kind() else _why_not("vnni")


@cache
def kind() -> str | None:
    """What multiplies here, one of KINDS; None = nothing."""
    return next((name for name in KINDS if _why_not(name) is None), None)


def _why_not(name: str) -> str | None:
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cap and (cap.startswith("AVX2") or not any(allowed in cap for allowed in _CAPS[name])):
        return f"oneDNN is capped to {cap}, and so is this"
    made = library(KINDS[name])
    if made is None:
        return "native code is not to be had"
    return None if made.qdm_products_here() else "this CPU has neither AVX512-VNNI nor AMX, or its system grants none"


def takes(outputs: int, terms: int) -> bool:
    """Is a layer of this size multiplied here?"""
    return outputs > 0 and terms > 0 and terms % STEP == 0 and why_not() is None


def pack(weight: Tensor) -> Packed:
    """int8 [N, K], K a multiple of 64, in panels of 32 outputs: [N / 32, K / 64, 2, 16, 16 outputs of 4 codes]."""
    n, k = weight.shape
    panels = F.pad(weight, (0, 0, 0, -n % SIDE)).view(-1, 2, 16, k // STEP, 16, 4)
    sums = weight.sum(1, dtype=torch.int64).to(torch.int32)
    return Packed(panels.permute(0, 3, 1, 4, 2, 5).contiguous(), sums, n, k)


def interleave(halves: Tensor) -> Tensor:
    """[2 I, ...] = values, then gates -> 16 values, their 16 gates, and so on; I is a multiple of 16."""
    return halves.unflatten(0, (2, -1, 16)).transpose(0, 1).flatten(0, 2)


@cache
def offsets(steps: int) -> Tensor:
    """Where the codes of each step lie in a row of a matrix."""
    return torch.arange(steps) * STEP


@cache
def tap_offsets(line: int, channels: int, kernel: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """The same in an image of lines of so many pixels: every tap, all of its channels."""
    (kh, kw), (dh, dw) = kernel, dilation
    pixels = (torch.arange(kh) * dh * line).view(-1, 1) + torch.arange(kw) * dw
    return (pixels.view(-1, 1) * channels + torch.arange(0, channels, STEP)).flatten().contiguous()


def product(
    x: Tensor, zero_point: int, packed: Packed, scale: Tensor, bias: Tensor | None, out: Tensor, *, row_scale: Tensor | None = None,
    residual: Tensor | None = None, gain: Tensor | None = None, grid: Grid | None = None, source: Source | None = None,
) -> Tensor:  # fmt: skip
    """float(sum (x - z) w) * scale + bias (+ residual) into out [M, N], float32 or bfloat16; int32: the sums alone.

    x: int8 [M, K], or uint8 codes shifted by +128 where VNNI multiplies, or, with a source, float32 or bfloat16.
    scale, bias: float32 [N]; row_scale: [M], a factor of scale; residual: as out.
    With a grid the weight is gated, and int8 or uint8 out [M, N / 2] takes the codes of value * gelu(gate) * gain.
    """
    rows = len(x)
    if rows < SIDE and kind() == "amx":
        spare = SIDE - rows
        x, own = F.pad(x, (0, 0, 0, spare)), None if row_scale is None else F.pad(row_scale.reshape(-1), (0, spare))
        made = out.new_empty((SIDE, out.shape[1]))
        out.copy_(product(x, zero_point, packed, scale, bias, made, row_scale=own, gain=gain, grid=grid, source=source)[:rows])
        return out if residual is None else out.add_(residual)
    where = {"images": 1, "rows": rows, "pitch": packed.terms, "channels": packed.terms}
    vectors = {"scale": scale, "bias": bias, "row_scale": row_scale, "residual": residual, "gain": gain}
    return _call(x, zero_point, packed, offsets(packed.terms // STEP), out, where, vectors, grid, source)


def convolution(
    x: Tensor, zero_point: int, packed: Packed, kernel: tuple[int, int], stride: int, dilation: tuple[int, int],
    border: tuple[int, int, int, int], scale: Tensor, bias: Tensor | None, out: Tensor, *, row_scale: Tensor | None = None,
    residual: Tensor | None = None, source: Source | None = None,
) -> Tensor:  # fmt: skip
    """The same of an image: x [B, H, W, C], out [B, H', W', N]; at least 32 rows (`rows_of`).

    border: left, right, top, bottom.
    """
    (b, h, w, c), (left, right, top, bottom) = x.shape, border
    line, reach = w + left + right, (kernel[0] - 1) * dilation[0]
    where = {"images": b, "rows": rows_of(h + top + bottom, line, kernel, stride, dilation), "line": line, "valid": out.shape[2]}
    where |= {"pitch": stride * c, "channels": c, "stride": stride, "height": h, "width": w, "top": top, "left": left, "reach": reach}
    vectors = {"scale": scale, "bias": bias, "row_scale": row_scale, "residual": residual}
    return _call(x, zero_point, packed, tap_offsets(line, c, kernel, dilation), out, where, vectors, None, source)


def rows_of(height: int, width: int, kernel: tuple[int, int], stride: int, dilation: tuple[int, int]) -> int:
    """Rows of the product of an image inside its border: from its first output to its last, with what lies between lines."""
    last_h, last_w = ((side - (k - 1) * d - 1) // stride for side, k, d in zip((height, width), kernel, dilation, strict=True))
    return last_h * width + last_w + 1


def _call(
    x: Tensor, zero_point: int, packed: Packed, steps: Tensor, out: Tensor, where: dict[str, int], vectors: dict[str, Tensor | None],
    grid: Grid | None, source: Source | None,
) -> Tensor:  # fmt: skip
    threads = torch.get_num_threads() if where["rows"] * where["images"] * packed.outputs * packed.terms > SMALLEST else 1
    kept = CACHED if packed.outputs * packed.terms > 1 << 20 or "line" in where else FIRST_LEVEL
    flip = 0x80 if kind() == "vnni" else 0  # its codes are unsigned
    x = to_unsigned(x) if flip and source is None else x
    chunk = max(kept // where["pitch"] // SIDE * SIDE, SIDE)
    numbers: dict[str, Any] = {"kind": _KINDS.get(out.dtype, _CODES), "x_kind": _SOURCES[x.dtype], "x_zero": zero_point, "x_flip": flip}
    pointers = vectors | {"x": x, "weight": packed.weight, "offsets": steps, "shift": _shift(packed, zero_point + flip), "out": out}
    if grid is not None:
        numbers |= {"inverse": grid.inverse, "zero": grid.zero_point, "bits": grid.bits, "flip": 0x80 if out.dtype == torch.uint8 else 0}
    if source is not None:
        numbers |= {"x_inverse": source.grid.inverse, "x_bits": source.grid.bits, "x_silu": source.silu}
        pointers |= {"x_gain": source.gain}
        if source.affine is not None:
            pointers |= {"factor": source.affine[0], "offset": source.affine[1]}
    fields = {name: None if t is None else t.data_ptr() for name, t in pointers.items()}
    call = _Product(**fields, **where, **numbers, steps=len(steps), outputs=packed.outputs, chunk=chunk, threads=threads)
    _function()(ctypes.byref(call))
    return out


def _shift(packed: Packed, zero_point: int) -> Tensor:
    """What the sums are too large by, kept for as long as the weight is."""
    kept = _shifts.setdefault(packed, {})
    if zero_point not in kept:
        kept[zero_point] = packed.row_sums * zero_point
    return kept[zero_point]


_shifts: WeakKeyDictionary[Packed, dict[int, Tensor]] = WeakKeyDictionary()


@cache
def _function():
    made = library(KINDS[kind() or "amx"])
    assert made is not None
    made.qdm_product.restype = None
    return made.qdm_product
