"""`attention.cpp`, `attention_short.cpp`, `attention_narrow.cpp` and `attention_bytes.cpp` on tensors."""

import ctypes
from dataclasses import dataclass
from enum import IntEnum
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.native.build import library
from qdm_kernels.native.producers import Grid
from qdm_kernels.native.quantize import quantize_into

WIDEST = 1024  # of a head: the sums of a block of queries stay in the second-level cache
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Products(IntEnum):
    """What multiplies, slowest first but for BYTES, which a caller asks for."""

    NONE = 0
    FLOATS = 1
    NARROW = 2  # fixed point, in AVX2
    SHORTS = 3  # fixed point, in AVX512-VNNI
    VECTORS = 4
    TILES = 5
    BYTES = 6  # 8-bit, in AVX512-VNNI


LIBRARIES = {  # best first: the source and its options
    Products.TILES: ("attention",),
    Products.VECTORS: ("attention", "-DQDM_NO_AMX"),
    Products.SHORTS: ("attention_short",),
    Products.NARROW: ("attention_narrow",),
    Products.FLOATS: ("attention", "-DQDM_FLOATS"),
    Products.BYTES: ("attention_bytes",),
}
LEAST_SHORTS = 128  # keys from which SHORTS beat FLOATS (1.0 to 1.6x; 0.6 to 1.0x with 77)
_UNBOUNDED = 2  # what a call returns that BYTES, SHORTS and NARROW do not compute


@cache
def products() -> Products:
    """What the native loop multiplies with on this machine: AMX tiles where the system grants them, else what AVX512 has."""
    return next((kind for kind in LIBRARIES if kind is not Products.BYTES and _library(kind) is not None), Products.NONE)


def fastest(k: Tensor) -> Products:
    """What multiplies with this many keys."""
    few = products() is Products.SHORTS and k.shape[2] < LEAST_SHORTS
    return Products.FLOATS if few and _library(Products.FLOATS) is not None else products()


def in_bytes() -> bool:
    """Does BYTES run here?"""
    return _library(Products.BYTES) is not None


@dataclass(frozen=True)
class Codes:
    """What outputs become: codes of output * gain. gain: float32 [H * d], None = 1; dtype: int8, or uint8 shifted by +128."""

    grid: Grid
    gain: Tensor | None = None
    dtype: torch.dtype = torch.int8


class _Codes(ctypes.Structure):
    _fields_ = [("inverse", ctypes.c_float), *((name, ctypes.c_int32) for name in ("zero", "bits", "flip")), ("gain", ctypes.c_void_p)]


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Does the native loop read these CPU tensors [B, H, L, d], [B, H, S, d]?"""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _KINDS or any(t.device.type != "cpu" for t in (q, k, v)):
        return False
    return scale > 0 and 0 < q.shape[3] <= WIDEST and k.shape[2] > 0 and products() is not Products.NONE


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: Products | None = None, codes: Codes | None = None) -> Tensor:
    """softmax(q k^T scale) v of what `takes` accepts -> [B, H, L, d], laid out as [B, L, H, d]. kind: None = `fastest`.

    Products in bfloat16 with float32 sums: keys in float32 lose a common part before they are rounded, weights are rounded, scores are not.
    FLOATS: all in float32. SHORTS and NARROW: products in 16-bit fixed point, 20 times closer than bfloat16; float32 where scores may be
    large. BYTES: products in 8 bits, off by 1.5 % at unit variance; `fastest` where queries and keys would lose more. codes: outputs,
    before they are rounded to the dtype of q, become codes of it, laid out alike.
    """
    library_ = _library(fastest(k) if kind is None else kind)
    if library_ is None:
        raise RuntimeError("no native attention on this machine")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, length, width = q.shape
    out = torch.empty((batch, length, heads, width), dtype=q.dtype if codes is None else codes.dtype).transpose(1, 2)
    sizes = (ctypes.c_int64 * 5)(batch, heads, length, k.shape[2], width)
    by = (ctypes.c_int64 * 12)(*(step for t in (q, k, v, out) for step in t.stride()[:3]))
    gain = None if codes is None or codes.gain is None else codes.gain.float().contiguous()
    target = None if codes is None else ctypes.byref(_Codes(*codes.grid.arguments(out)[:4], None if gain is None else gain.data_ptr()))
    call = getattr(library_, f"qdm_attention_{_KINDS[q.dtype]}")
    result = call(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), sizes, by, scale, torch.get_num_threads(), target)
    if result == _UNBOUNDED and batch > 1:  # an image does not depend on those beside it
        each = [attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], scale, kind, codes).transpose(1, 2) for i in range(batch)]
        return torch.cat(each).transpose(1, 2)
    if result == _UNBOUNDED:
        return attention(q, k, v, scale, None, codes) if kind is Products.BYTES else _in_float32(q, k, v, scale, codes)
    if result:
        raise MemoryError("attention: no memory for packed keys and values")
    return out


def _in_float32(q: Tensor, k: Tensor, v: Tensor, scale: float, codes: Codes | None) -> Tensor:
    """What norms do not bound: the loop of AVX512, or torch's kernel where there is none."""
    if _library(Products.FLOATS) is not None:
        return attention(q, k, v, scale, Products.FLOATS, codes)
    out = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), scale=scale).transpose(1, 2)
    if codes is None:
        return out.to(q.dtype).contiguous().transpose(1, 2)
    rows = out.flatten(2) if codes.gain is None else out.flatten(2) * codes.gain
    made = torch.empty(rows.shape, dtype=codes.dtype)
    quantize_into(rows.contiguous(), made, codes.grid.inverse, codes.grid.zero_point, codes.grid.bits, unsigned=codes.dtype == torch.uint8)
    return made.view(out.shape).transpose(1, 2)


@cache
def _library(kind: Products) -> ctypes.CDLL | None:
    """The library whose products are of this kind; None = not on this machine."""
    made = None if kind is Products.NONE else library(*LIBRARIES[kind])
    if made is None or made.qdm_attention_products() != kind:
        return None
    for name in _KINDS.values():
        function = getattr(made, f"qdm_attention_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p] * 6 + [ctypes.c_float, ctypes.c_int, ctypes.c_void_p], ctypes.c_int
    return made
