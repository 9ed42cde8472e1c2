"""softmax(q k^T * scale) v without mask, where it beats torch's own kernel: compiled here, else bfloat16 products by torch's operators."""

import functools
import os
from collections.abc import Callable

import torch
from torch import Tensor

from qdm_kernels.attention import cpu
from qdm_kernels.native import attention as native
from qdm_kernels.native.attention import Codes, Products
from qdm_kernels.prepared import integer_op

SHORTEST = 1024  # queries and keys; below, torch's kernel keeps all scores in the cache
SHORTEST_TILED = 256  # where AMX multiplies in torch's kernel
SHORTEST_NATIVE = 16  # where the compiled one multiplies bf16, in AMX or, without it, in AVX512 (1.8 to 4.7x from 64 keys and queries on)
SHORTEST_BYTES = {Products.VECTORS: 1024, Products.SHORTS: 256}  # in 8 bits, beside what multiplies otherwise: 1.6x and 2.2x there
SHORTEST_FLOATS = 64  # where that has neither tiles nor bf16, in float32 (1.4 to 2.3x from 64 keys and queries on)
# In AVX2, fixed point: 77 keys of a prompt pay (1.4 to 1.7x at 256 to 4096 queries), 64 keys and queries of width 160 do not (0.8 to 1.0x).
SHORTEST_NARROW = 77
_WITHOUT_BF16 = (Products.FLOATS, Products.NARROW, Products.SHORTS)
_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "bf16")


@functools.cache
def why_not_cpu() -> str | None:
    """Why this CPU gains nothing; None = it multiplies bf16 natively."""
    flags = _flags()
    if not any(flags.get(name) for name in _BF16_FLAGS):
        return "this CPU has no native bf16: torch's float32 attention is faster"
    cap = _cap()
    if cap and not any(name in cap for name in ("BF16", "AMX", "FP16", "DEFAULT", "ALL")):
        return f"oneDNN is capped to {cap}, without native bf16"
    return None


def why_not_here() -> str | None:
    """Why no product of this machine gains; None = some do, in bf16 or in compiled float32 or fixed point."""
    return None if native.products() in _WITHOUT_BF16 else why_not_cpu()


def shortest() -> int:
    """Length of queries and keys from which the op is the faster one."""
    if native.products() is Products.NARROW:
        return SHORTEST_NARROW
    if native.products() in _WITHOUT_BF16:
        return SHORTEST_FLOATS
    if native.products() is Products.TILES or (native.products() is Products.VECTORS and not has_tiles()):
        return SHORTEST_NATIVE
    return SHORTEST_TILED if has_tiles() else SHORTEST


def has_tiles() -> bool:
    """Does this CPU multiply bf16 in AMX tiles? There torch's kernel beats torch's operators, even where a cap forbids the tiles."""
    return bool(_flags().get("amx_bf16"))


def _flags() -> dict[str, object]:
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def _cap() -> str:
    return os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()


def why_not(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the op leaves a product to torch; None = it takes it."""
    if q.device.type != "cpu":
        return f"runs on the cpu, the tensors are on {q.device}"
    if reason := why_not_here():
        return reason
    if q.dim() != 4 or q.shape[:2] != k.shape[:2] or k.shape != v.shape:
        return "queries, keys and values are [B, H, L, d] with equal heads and widths"
    if q.dtype not in (torch.float32, torch.bfloat16):
        return f"computes in bf16, the queries are {q.dtype}"
    if min(q.shape[2], k.shape[2]) < shortest():
        return f"sequences below {shortest()}"
    if has_tiles() and q.dtype == torch.bfloat16 and native.products() is not Products.TILES:
        return "torch's own kernel is the one that this CPU's tiles run"
    if native.products() in _WITHOUT_BF16 and not native.takes(q, k, v, 1.0):
        return "the compiled loop reads one dtype and heads of up to 1024, and nothing else here beats torch's kernel"
    return "gradients" if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)) else None


def bytes_pay(q: Tensor, k: Tensor) -> bool:
    """Are products in 8 bits the fastest ones for these lengths? QDM_ATTENTION_BITS=16 says that they are not wanted."""
    if os.environ.get("QDM_ATTENTION_BITS", "8") != "8" or has_tiles() or not native.in_bytes():
        return False
    least = SHORTEST_BYTES.get(native.products())
    return least is not None and min(q.shape[2], k.shape[2]) >= least


@integer_op
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, eight_bit: bool = False) -> Tensor:
    """q [B, H, L, d], k, v [B, H, S, d] float -> [B, H, L, d], the dtype of q. scale: None = 1 / sqrt(d).

    Products in bfloat16 with float32 sums, weights rounded to bfloat16, without a compiler scores too; on CPUs without bfloat16 in
    float32 or fixed point. eight_bit: q, k and v are as coarse as 8 bits, and their products may be: they are where that is faster
    (`bytes_pay`) and the values allow it. ValueError: other shapes, no keys.
    """
    if q.dim() != 4 or q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3] or k.shape[2] == 0:
        raise ValueError(f"q [B, H, L, d] and k, v [B, H, S > 0, d], got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    implementation = _implementation(q, k, v, scale)
    if eight_bit and implementation is native.attention and bytes_pay(q, k):
        return native.attention(q, k, v, scale, Products.BYTES)
    return implementation(q, k, v, scale)


@integer_op
def codes(q: Tensor, k: Tensor, v: Tensor, to: Codes, *, eight_bit: bool = False) -> Tensor | None:
    """Codes of `attention` [B, L, H * d], as the layer that follows reads them, in one pass; None = no compiled loop is the faster one.

    eight_bit: as of `attention`.
    """
    scale = q.shape[-1] ** -0.5
    if why_not(q, k, v) is not None or _implementation(q, k, v, scale) is not native.attention:
        return None
    kind = Products.BYTES if eight_bit and bytes_pay(q, k) else None
    return native.attention(q, k, v, scale, kind, to).transpose(1, 2).flatten(2)


def _implementation(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Compiled tiles first; compiled vectors would lose to the tiles of torch's kernel."""
    worst = Products.TILES if has_tiles() else Products.FLOATS
    if native.products() >= worst and native.takes(q, k, v, scale):
        return native.attention
    return cpu.tiled if has_tiles() else cpu.attention
