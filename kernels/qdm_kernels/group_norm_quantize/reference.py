"""Normalization and activation in float64."""

import torch
from torch import Tensor


def normalize(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, gain: Tensor | None, eps: float, activation: str
) -> Tensor:
    """activation(group_norm(x) * weight + bias) * gain: [B, C, H, W] -> float32 channels_last, rounded once. weight, bias, gain: [C]."""
    grouped = x.double().unflatten(1, (groups, x.shape[1] // groups)).flatten(2)
    centred = grouped - grouped.mean(2, keepdim=True)
    y = (centred / (centred.square().mean(2, keepdim=True) + eps).sqrt()).view(x.shape)
    column = (1, -1, 1, 1)
    y = y if weight is None else y * weight.double().view(column)
    y = y if bias is None else y + bias.double().view(column)
    y = y * torch.sigmoid(y) if activation == "silu" else y
    y = y if gain is None else y * gain.double().view(column)
    return y.float().contiguous(memory_format=torch.channels_last)
