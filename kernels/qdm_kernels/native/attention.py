"""`attention.cpp` on tensors."""

import ctypes
from enum import IntEnum
from functools import cache

import torch
from torch import Tensor

from qdm_kernels.native.build import library

WIDEST = 1024  # of a head: the sums of a block of queries stay in the second-level cache
_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Products(IntEnum):
    """What multiplies, slowest first."""

    NONE = 0
    FLOATS = 1
    VECTORS = 2
    TILES = 3


_OPTIONS = {Products.TILES: (), Products.VECTORS: ("-DQDM_NO_AMX",), Products.FLOATS: ("-DQDM_FLOATS",)}  # best first


@cache
def products() -> Products:
    """What the native loop multiplies with on this machine: AMX tiles where the system grants them, AVX512-BF16, or AVX512 alone."""
    return next((kind for kind in _OPTIONS if _library(kind) is not None), Products.NONE)


def takes(q: Tensor, k: Tensor, v: Tensor, scale: float) -> bool:
    """Does the native loop read these CPU tensors [B, H, L, d], [B, H, S, d]?"""
    if not q.dtype == k.dtype == v.dtype or q.dtype not in _KINDS or any(t.device.type != "cpu" for t in (q, k, v)):
        return False
    return scale > 0 and 0 < q.shape[3] <= WIDEST and products() is not Products.NONE


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, kind: Products | None = None) -> Tensor:
    """softmax(q k^T scale) v of what `takes` accepts -> [B, H, L, d], laid out as [B, L, H, d]. kind: None = the fastest here.

    Products in bfloat16 with float32 sums: keys in float32 lose a common part before they are rounded, weights are rounded, scores are not.
    Of the kind FLOATS all is float32.
    """
    library_ = _library(products() if kind is None else kind)
    if library_ is None:
        raise RuntimeError("no native attention on this machine")
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    batch, heads, length, width = q.shape
    out = torch.empty((batch, length, heads, width), dtype=q.dtype).transpose(1, 2)
    sizes = (ctypes.c_int64 * 5)(batch, heads, length, k.shape[2], width)
    by = (ctypes.c_int64 * 12)(*(step for t in (q, k, v, out) for step in t.stride()[:3]))
    call = getattr(library_, f"qdm_attention_{_KINDS[q.dtype]}")
    if call(q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), sizes, by, scale, torch.get_num_threads()):
        raise MemoryError("attention: no memory for packed keys and values")
    return out


@cache
def _library(kind: Products) -> ctypes.CDLL | None:
    """The library whose products are of this kind; None = not on this machine."""
    made = None if kind is Products.NONE else library("attention", *_OPTIONS[kind])
    if made is None or made.qdm_attention_products() != kind:
        return None
    for name in _KINDS.values():
        function = getattr(made, f"qdm_attention_{name}")
        function.argtypes, function.restype = [ctypes.c_void_p] * 6 + [ctypes.c_float, ctypes.c_int], ctypes.c_int
    return made
