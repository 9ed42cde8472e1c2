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
