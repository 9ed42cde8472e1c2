"""Normalization and rotation by torch's operators, in float32."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rotate(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """As `reference.rotate`: -> float32."""
    y = F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    even, odd = y.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return y * cos.float()[:, None] + turned * sin.float()[:, None]
