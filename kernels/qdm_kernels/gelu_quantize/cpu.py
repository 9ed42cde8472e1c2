"""Activation in float32, from torch's own operators: under torch.compile they become one loop with the quantization."""

import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, gated: bool, approximate: str, gain: Tensor | None) -> Tensor:
    """As `reference.activate`, in float32."""
    value, gate = x.float().chunk(2, -1) if gated else (None, x.float())
    y = F.gelu(gate, approximate=approximate)
    y = y if value is None else value * y
    return y if gain is None else y * gain.float()
