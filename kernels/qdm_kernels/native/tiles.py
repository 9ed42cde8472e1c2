"""`tiles.cpp`, `vectors.cpp`, `narrow.cpp` and `winograd.cpp` on tensors: products of codes in AMX tiles, else in AVX512-VNNI or AVX2."""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.exact import centred_range, l1_by_input, subtract_zero_point
from qdm_kernels.native.build import library
from qdm_kernels.native.producers import Grid
from qdm_kernels.onednn import to_unsigned

KINDS = {"amx": "tiles", "vnni": "vectors", "avx2": "narrow"}  # what multiplies, best first, and the file that does
WINOGRAD = "winograd"  # the file of 3x3 convolutions in AVX2
STRATEGIES = (*KINDS, WINOGRAD)  # of layers that run here
_AVX512 = ("AMX", "DEFAULT", "ALL", "VNNI", "BF16", "FP16", "AVX10")
_CAPS = {"amx": ("AMX", "DEFAULT", "ALL"), "vnni": _AVX512, "avx2": (*_AVX512, "AVX2", "AVX512")}  # of oneDNN, that allow it
SIDE, STEP = 32, 64  # rows and outputs of a block; codes that one tile instruction sums
ROWS = {"amx": SIDE, "vnni": SIDE, "avx2": 48}  # of a block
CACHED, FIRST_LEVEL = 1_250_000, 32_768  # bytes of codes that stay while weights pass by: in the second-level cache, in the first
LAST_LEVEL = 4_000_000  # bytes of transformed codes that stay, in the last-level cache
FOLD = 16  # channels of an image that are transformed at a time
POINTS, FEWEST, MOST = 16, 24, 48  # of a transformed tile of 4x4 codes; tiles that are transformed together
SMALLEST = 4_000_000  # multiply-adds below which a second thread costs more than it saves
_KINDS, _CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int32: 2}, 3
_SOURCES = {torch.int8: 0, torch.uint8: 0, torch.float32: 1, torch.bfloat16: 2}
_P, _L, _I = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("x", "weight", "offsets", "shift", "scale", "bias", "row_scale", "residual", "out", "gain")),
        *((name, _P) for name in ("factor", "offset", "x_gain", "centre")),
        *((name, _L) for name in ("images", "rows", "pitch", "steps", "outputs", "channels", "stride", "line", "valid")),
        *((name, _L) for name in ("height", "width", "top", "left", "reach", "chunk")),
        *((name, _I) for name in ("x_kind", "x_silu")),
        ("x_inverse", ctypes.c_float),
        *((name, _I) for name in ("x_zero", "x_bits", "kind")),
        ("inverse", ctypes.c_float),
        *((name, _I) for name in ("zero", "bits", "flip", "x_flip", "threads", "partial")),
    ]


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight [N, K] in panels. row_sums: int32 [N]; a gated one has its two halves interleaved, and so have its vectors.

    flip: what codes are changed by before they are multiplied, 0x80 = shifted to unsigned, as uint8 ones are already; 0 = int8 alone.
    partial: groups of four codes whose sums stay in 16 bits; 0 = none. transformed: 3x3 kernels for `winograd.cpp`, int16.
    centre: int32 [N], zero points that the weight still holds, since it would not fit into int8 without them; row_sums do not hold them.
    """

    weight: Tensor
    row_sums: Tensor
    outputs: int
    terms: int
    flip: int = 0
    partial: int = 0
    transformed: bool = False
    centre: Tensor | None = None


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
    return None if kind() else _why_not("avx2")


@cache
def kind() -> str | None:
    """What multiplies here, one of KINDS; None = nothing."""
    return next((name for name in KINDS if _why_not(name) is None), None)


def _why_not(name: str) -> str | None:
    cap = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    if cap and (not any(allowed in cap for allowed in _CAPS[name]) or (cap.startswith("AVX2") and name != "avx2")):
        return f"oneDNN is capped to {cap}, and so is this"
    made = library(KINDS[name])
    if made is None:
        return "native code is not to be had"
    return None if made.qdm_products_here() else "no products for this CPU: AMX that the system grants, AVX512-VNNI, or AVX2 alone"


def takes(outputs: int, terms: int) -> bool:
    """Is a layer of this size multiplied here?"""
    return outputs > 0 and terms > 0 and terms % STEP == 0 and why_not() is None


def pack(codes: Tensor, zero_point: Tensor | None = None) -> Packed:
    """int8 [N, K] and its zero points [N], K a multiple of 64, in panels of 32 outputs: [N / 32, K / 64, 2, 16, 16 outputs of 4 codes].

    Where 16-bit codes are multiplied: [N / 32, K / 64, 2, 32, 16 outputs of 2].
    """
    n, k = codes.shape
    zero = torch.zeros(n, dtype=torch.int32) if zero_point is None else zero_point.to(torch.int32).contiguous()
    low, high = centred_range(codes, zero)
    whole = low >= -128 and high <= 127  # does the weight minus its zero points fit into bytes?
    partial = _partial(max(-low, high)) if kind() == "avx2" else 0
    together = 2 if kind() == "avx2" and not partial else 4
    panels = torch.empty((-(-n // SIDE), k // STEP, 2, STEP // together, 16, together), dtype=torch.int8)
    sums = torch.empty(n, dtype=torch.int32)
    codes = codes.contiguous()
    taken = zero.data_ptr() if whole else None
    _packing().qdm_pack_panels(codes.data_ptr(), taken, n, k, together, panels.data_ptr(), sums.data_ptr(), torch.get_num_threads())
    flip = 0x80 if kind() == "vnni" or partial else 0
    return Packed(panels, sums if whole else sums - k * zero, n, k, flip, partial, centre=None if whole else zero)


def _partial(most: int) -> int:
    """How many products of four unsigned codes with weights so large, added two by two, are sure to fit into 16 bits: 8, 4 or (0) fewer."""
    return next((fours for fours in (8, 4) if fours * 2 * 255 * most < 1 << 15), 0)


def takes_image(channels: int, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Is a convolution of this kind transformed here, if its weights allow it?"""
    fits = kernel == (3, 3) and stride == dilation == (1, 1) and channels > 0 and channels % FOLD == 0
    return fits and kind() == "avx2" and library(WINOGRAD) is not None


def transforms(codes: Tensor, zero_point: Tensor) -> bool:
    """Do weights [O, I, 3, 3] allow it? Four times their sums must fit into int32."""
    if not codes.numel():
        return False
    largest = codes[0].numel() * max(map(abs, centred_range(codes, zero_point)))
    if 4 * 128 * largest >= 1 << 31:
        largest = int(l1_by_input(subtract_zero_point(codes, zero_point)).sum(1).max())
    return 4 * 128 * largest < 1 << 31


def transform(codes: Tensor, zero_point: Tensor) -> Packed:
    """int8 [O, I, 3, 3] minus zero points [O] as 2 G g 2 G', I a multiple of 16: int16 [O / 16, 16 points, I / 2, 16 outputs of 2]."""
    filters, channels = codes.shape[:2]
    codes, zero = codes.contiguous(), zero_point.to(torch.int32).contiguous()
    points = torch.empty((-(-filters // 16), POINTS, channels // 2, 16, 2), dtype=torch.int16)
    sums = torch.empty(filters, dtype=torch.int32)
    at = codes.data_ptr(), zero.data_ptr(), filters, channels, points.data_ptr(), sums.data_ptr()
    _packing().qdm_pack_points(*at, torch.get_num_threads())
    return Packed(points, sums, filters, 9 * channels, transformed=True)


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

    x: int8 [M, K], or uint8 codes shifted by +128 where the weight's `flip` says so, or, with a source, float32 or bfloat16.
    scale, bias: float32 [N]; row_scale: [M], a factor of scale; residual: as out.
    With a grid the weight is gated, and int8 or uint8 out [M, N / 2] takes the codes of value * gelu(gate) * gain.
    """
    rows, x = len(x), x.contiguous()  # windows of a stride may be a view that skips pixels
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
    """The same of an image: x [B, H, W, C], out [B, H', W', N]; at least 32 rows (`rows_of`), unless the weight is transformed.

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
    x = to_unsigned(x) if packed.flip and source is None else x
    chunk = _together(packed, where)
    numbers: dict[str, Any] = {"kind": _KINDS.get(out.dtype, _CODES), "x_kind": _SOURCES[x.dtype], "x_zero": zero_point}
    numbers |= {"x_flip": packed.flip, "partial": packed.partial}
    shift = _shift(packed, zero_point + packed.flip)
    pointers = vectors | {"x": x, "weight": packed.weight, "offsets": steps, "shift": shift, "centre": packed.centre, "out": out}
    if grid is not None:
        numbers |= {"inverse": grid.inverse, "zero": grid.zero_point, "bits": grid.bits, "flip": 0x80 if out.dtype == torch.uint8 else 0}
    if source is not None:
        numbers |= {"x_inverse": source.grid.inverse, "x_bits": source.grid.bits, "x_silu": source.silu}
        pointers |= {"x_gain": source.gain}
        if source.affine is not None:
            pointers |= {"factor": source.affine[0], "offset": source.affine[1]}
    fields = {name: None if t is None else t.data_ptr() for name, t in pointers.items()}
    call = _Product(**fields, **where, **numbers, steps=len(steps), outputs=packed.outputs, chunk=chunk, threads=threads)
    _function(packed.transformed)(ctypes.byref(call))
    return out


def _together(packed: Packed, where: dict[str, int]) -> int:
    """Rows, or tiles of transformed codes, that stay in a cache while the weights pass by; parts of about equal size."""
    if packed.transformed:
        lines = -(-where["rows"] // where["line"])
        tiles = where["images"] * -(-lines // 2) * -(-where["valid"] // 2)
        return _equal(tiles, max(min(LAST_LEVEL // (2 * POINTS * where["channels"]), MOST), FEWEST), 6)
    bytes_ = 2 if kind() == "avx2" and not packed.partial else 1
    kept = CACHED if packed.outputs * packed.terms > 1 << 20 or "line" in where else FIRST_LEVEL
    return _equal(where["rows"], kept // (bytes_ * where["pitch"]), ROWS[kind() or "amx"])


def _equal(count: int, most: int, unit: int) -> int:
    """The size of a part, a multiple of `unit`, where parts are as large as `most` allows and equal; `most` where one part holds all."""
    most = max(most // unit, 1) * unit
    parts = -(-count // most)
    return most if parts < 2 else -(-count // (parts * unit)) * unit


def _shift(packed: Packed, zero_point: int) -> Tensor:
    """What the sums are too large by, kept for as long as the weight is."""
    kept = _shifts.setdefault(packed, {})
    if zero_point not in kept:
        kept[zero_point] = packed.row_sums * zero_point
    return kept[zero_point]


_shifts: WeakKeyDictionary[Packed, dict[int, Tensor]] = WeakKeyDictionary()


@cache
def _function(transformed: bool):
    made = library(WINOGRAD if transformed else KINDS[kind() or "amx"])
    assert made is not None
    function = made.qdm_winograd if transformed else made.qdm_product
    function.restype = None
    return function


@cache
def _packing() -> ctypes.CDLL:
    made = library("packing")
    assert made is not None
    made.qdm_pack_panels.argtypes = [_P, _P, _L, _L, ctypes.c_int, _P, _P, ctypes.c_int]
    made.qdm_pack_points.argtypes = [_P, _P, _L, _L, _P, _P, ctypes.c_int]
    made.qdm_pack_panels.restype = made.qdm_pack_points.restype = None
    return made
