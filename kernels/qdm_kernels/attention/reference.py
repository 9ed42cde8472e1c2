"""softmax(q k^T * scale) v in float64."""

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [B, H, L, d], k, v [B, H, S, d] -> [B, H, L, d], the dtype of q."""
    weights = torch.softmax(q.double() @ k.double().transpose(-1, -2) * scale, -1)
    return (weights @ v.double()).to(q.dtype)
