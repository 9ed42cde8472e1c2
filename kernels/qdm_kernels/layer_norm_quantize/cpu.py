"""Normalization and modulation in float32, from torch's own operators: under torch.compile they become one loop with the quantization."""

import torch.nn.functional as F
from torch import Tensor


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float) -> Tensor:
    """As `reference.normalize`, in float32."""
    gamma, beta = (None if t is None else t.float() for t in (weight, bias))
    y = F.layer_norm(x.float(), x.shape[-1:], gamma, beta, eps)
    if modulation:
        m, shift = (t.float().view(t.shape[0], *[1] * (x.dim() - 2), t.shape[1]) for t in modulation)
        y = y * (1 + m) + shift
    return y if gain is None else y * gain.float()
