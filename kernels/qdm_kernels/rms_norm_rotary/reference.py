"""Normalization and rotation in float64."""

import torch
from torch import Tensor


def rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight, whose pairs (2i, 2i + 1) turn: [B, L, H, D] -> float64. weight: [D]; cos, sin: [L, D]."""
    wide = x.double()
    y = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return y * cos.double()[:, None] + turned * sin.double()[:, None]
