"""Oracles of the fused producers: float64 values before rounding, and how far codes may stand from them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight=None, bias=None, modulation=None, gain=None, eps: float = 1e-5) -> Tensor:
    y = F.layer_norm(x.double(), x.shape[-1:], *(None if t is None else t.double() for t in (weight, bias)), eps)
    if modulation is not None:
        m, shift = (t.double().reshape(len(t), *[1] * (x.dim() - 2), t.shape[1]) for t in modulation)
        y = y * (1 + m) + shift
    return y if gain is None else y * gain.double()


def group_norm(x: Tensor, groups: int, weight=None, bias=None, gain=None, activation: str = "silu", eps: float = 1e-5) -> Tensor:
    y = torch.group_norm(x.double(), groups, *(None if t is None else t.double() for t in (weight, bias)), eps)
    y = F.silu(y) if activation == "silu" else y
    return y if gain is None else y * gain.double().view(1, -1, 1, 1)


def gelu(x: Tensor, gated: bool = False, approximate: str = "none", gain=None) -> Tensor:
    value, gate = x.double().chunk(2, -1) if gated else (1.0, x.double())
    y = value * F.gelu(gate, approximate=approximate)
    return y if gain is None else y * gain.double()


def turned(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """RMSNorm and rotation of pairs, x [B, L, H, D], written out entry by entry."""
    y = F.rms_norm(x.double(), x.shape[-1:], None if weight is None else weight.double(), eps)
    cos, sin, out = cos.double()[:, None], sin.double()[:, None], torch.empty_like(y)
    out[..., 0::2] = y[..., 0::2] * cos[..., 0::2] - y[..., 1::2] * sin[..., 0::2]
    out[..., 1::2] = y[..., 1::2] * cos[..., 1::2] + y[..., 0::2] * sin[..., 1::2]
    return out


def check_heads(tokens: int, at: int, total: int, heads: int, width: int, dtype: torch.dtype, device: str = "cpu", **how) -> None:
    """One call of `rms_norm_rotary_` on column slices of a joint product, against float64, around it nothing is written.

    how: batch (2), weighted (True), values (True), joint (True; else three tensors).
    """
    from qdm_kernels.rms_norm_rotary.op import rms_norm_rotary_

    rng = torch.Generator().manual_seed(tokens * 31 + width)
    options = {"batch": 2, "weighted": True, "values": True, "joint": True} | how
    batch, columns = options["batch"], heads * width

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(device)

    product = (draw(batch, tokens, 3 * columns) * 3).to(dtype)
    parts = product.split(columns, -1) if options["joint"] else [part.contiguous() for part in product.split(columns, -1)]
    q, k, v = (part.unflatten(-1, (heads, width)) for part in parts)
    cos, sin = draw(total, width), draw(total, width)  # entries of a pair differ: each has its own
    weights = (draw(width).to(dtype), draw(width).to(dtype)) if options["weighted"] else (None, None)
    out = [torch.full((batch, total, heads, width), -7.0, dtype=dtype, device=device) for _ in range(3)]
    kept = options["values"]
    to, x = (out[0], out[1], out[2] if kept else None), (q, k, v if kept else None)
    rms_norm_rotary_(to, x, (cos, sin), weights=weights, at=at, eps=1e-5)
    here = slice(at, at + tokens)
    for got, given, weight in zip(out, (q, k), weights, strict=False):
        want = turned(given, weight, cos[here], sin[here], 1e-5)
        size = want.abs().amax() if want.numel() else 0
        assert ((got[:, here].double() - want).abs() <= torch.finfo(dtype).eps / 2 * want.abs() + 2e-6 * size).all()
    if kept:
        assert torch.equal(out[2][:, here], v)
    for i, got in enumerate(out):
        untouched = torch.cat([got[:, :at], got[:, at + tokens :]], 1) if i < 2 or kept else got
        assert untouched.eq(-7).all()


def check_codes(codes: Tensor, exact: Tensor, scale: Tensor, zero: int = 0, bits: int = 8, slack: float = 2e-3) -> None:
    """Every code is the nearest to its float64 value, or next to it where the value lies within `slack` of a tie; not all are extreme."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    want = (exact / scale.double() + zero).clamp(low, high)
    assert codes.dtype == torch.int8
    assert codes.shape == want.shape
    far = (codes.double() - want).abs().max() if codes.numel() else torch.zeros(())
    assert far <= 0.5 + slack, f"a code stands {far:.4f} from its value"
    inner = codes[(codes > low) & (codes < high)]
    assert codes.numel() < 256 or len(inner.unique()) > 8, "the scale hides everything"


def check_rows(codes: Tensor, scale: Tensor, exact: Tensor, bits: int = 8) -> None:
    """Symmetric codes of rows: the scale is max|row| over the largest code, and the codes are those of that scale."""
    top = exact.abs().amax(-1, keepdim=True)
    want = torch.where(top > 1e-30, top / ((1 << bits - 1) - 1), torch.ones_like(top))
    assert scale.dtype == torch.float32
    assert ((scale.double() - want).abs() <= 1e-5 * want + 1e-9).all()
    check_codes(codes, exact, scale, bits=bits)
