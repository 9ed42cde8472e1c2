"""Normalization and modulation in float64."""

from torch import Tensor


def normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, modulation: list[Tensor], gain: Tensor | None, eps: float) -> Tensor:
    """((x - mean) / sqrt(var + eps) * weight + bias) * (1 + m) + shift, times gain: [B, ..., K] -> float32, rounded once.

    modulation: [] or [m, shift], each [B, K]; gain: [K].
    """
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.double()
    y = y if bias is None else y + bias.double()
    if modulation:
        m, shift = (t.double().view(t.shape[0], *[1] * (x.dim() - 2), t.shape[1]) for t in modulation)
        y = y * (1 + m) + shift
    return (y if gain is None else y * gain.double()).float()
