"""Activation in float64."""

import torch.nn.functional as F
from torch import Tensor


def activate(x: Tensor, gated: bool, approximate: str, gain: Tensor | None) -> Tensor:
    """gelu(x) * gain, or with gated value * gelu(gate) * gain for x = [value, gate]: [..., K or 2 K] -> float32 [..., K], rounded once."""
    value, gate = x.double().chunk(2, -1) if gated else (None, x.double())
    y = F.gelu(gate, approximate=approximate)
    y = y if value is None else value * y
    return (y if gain is None else y * gain.double()).float()
