"""Heads of queries and keys, normalized and turned by their position, written where attention reads them (README: Producers)."""

from functools import cache
from importlib import import_module
from types import ModuleType

from torch import Tensor

from qdm_kernels import backend
from qdm_kernels.prepared import integer_op

Heads = tuple[Tensor, Tensor, Tensor | None]  # queries, keys, values; None = the values stay where they are


@cache
def _implementation(name: str) -> ModuleType:
    return import_module(f"qdm_kernels.rms_norm_rotary.{name}")


@integer_op
def rms_norm_rotary_(
    out: Heads, heads: Heads, rotary: tuple[Tensor, Tensor], *, weights: tuple[Tensor | None, Tensor | None] = (None, None), at: int = 0,
    eps: float = 1e-6,
) -> None:  # fmt: skip
    """Fill tokens `at`.. of `out`: queries and keys by RMSNorm over D and rotary embedding, values as they are.

    heads: float [B, L, H, D], of any strides; column slices of one product are read in place. out: contiguous [B, S, H, D], S >= at + L.
    rotary: (cos, sin) [S, D] of all tokens; entries 2i and 2i + 1 are a pair: out[2i] = x[2i] cos[2i] - x[2i + 1] sin[2i],
    out[2i + 1] = x[2i + 1] cos[2i + 1] + x[2i] sin[2i + 1]. weights: [D], of the norms of queries and keys; None = 1. Computed in float32,
    rounded once. ValueError on shapes that do not fit.
    """
    _check(out, heads, rotary, weights, at)
    cos, sin = rotary
    name = backend.choose("rms_norm_rotary", device=heads[0].device)
    if name == "triton" and _implementation(name).why_not(heads[0].shape[-1]):
        name = backend.choose("rms_norm_rotary", device=heads[0].device, without=name)
    home = _implementation(name)
    if hasattr(home, "rms_norm_rotary_"):
        home.rms_norm_rotary_(out, heads, weights, cos, sin, at, eps)
        return
    here = slice(at, at + heads[0].shape[1])
    for to, x, weight in zip(out[:2], heads[:2], weights, strict=True):
        to[:, here] = home.rotate(x, weight, cos[here], sin[here], eps)
    if out[2] is not None:
        out[2][:, here] = heads[2]


def _check(out: Heads, heads: Heads, rotary: tuple[Tensor, Tensor], weights: tuple[Tensor | None, Tensor | None], at: int) -> None:
    q, to = heads[0], out[0]
    if q.dim() != 4 or not q.is_floating_point() or q.shape[3] % 2:
        raise ValueError(f"queries are float [B, L, H, D] with an even D, got {q.dtype} {tuple(q.shape)}")
    if (heads[2] is None) != (out[2] is None):
        raise ValueError("values come with a place to write them, or neither does")
    for x in heads[1:]:
        if x is not None and (x.shape != q.shape or x.dtype != q.dtype):
            raise ValueError(f"keys and values are like the queries, {q.dtype} {tuple(q.shape)}, got {x.dtype} {tuple(x.shape)}")
    if to.dim() != 4 or (to.shape[0], *to.shape[2:]) != (q.shape[0], *q.shape[2:]) or not 0 <= at <= to.shape[1] - q.shape[1]:
        raise ValueError(f"out is [B, S, H, D] with room for {q.shape[1]} tokens at {at}, got {tuple(to.shape)} for {tuple(q.shape)}")
    for y in out:
        if y is not None and (y.shape != to.shape or y.dtype != to.dtype or not y.is_contiguous() or not y.is_floating_point()):
            raise ValueError(f"outputs are contiguous, float and alike, got {y.dtype} {tuple(y.shape)} beside {to.dtype} {tuple(to.shape)}")
    for one in rotary:
        if one.shape != (to.shape[1], q.shape[3]) or not one.is_floating_point():
            raise ValueError(f"cos and sin are float [S, D], {(to.shape[1], q.shape[3])}, got {one.dtype} {tuple(one.shape)}")
    for weight in weights:
        if weight is not None and weight.shape != q.shape[3:]:
            raise ValueError(f"weights have one entry per column, [{q.shape[3]}], got {tuple(weight.shape)}")
    placed = (*heads, *out, *rotary, *weights)
    if any(one is not None and one.device != q.device for one in placed):
        raise ValueError(f"all tensors lie on one device, that of the queries: {q.device}")
