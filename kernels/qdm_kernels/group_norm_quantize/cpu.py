"""Normalization and activation in float32, from torch's own operators: under torch.compile they become one loop with the quantization."""

import torch
import torch.nn.functional as F
from torch import Tensor


def normalize(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str
) -> Tensor:
    """As `reference.normalize`, in float32."""
    affine = [None if t is None else t.float() for t in (weight, bias)]
    y = torch.group_norm(x.float(), groups, *affine, eps)
    y = F.silu(y) if activation == "silu" else y
    y = y if gain is None else y * gain.float().view(1, -1, 1, 1)
    return y.contiguous(memory_format=torch.channels_last)
