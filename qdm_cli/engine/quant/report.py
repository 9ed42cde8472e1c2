"""Tables and figures about a quantized state, for manifests and people."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdm_cli.engine.quant.grid import QParams, dequantize
from qdm_cli.engine.quant.modules import per_input, weight_before_codes, weight_granularity
from qdm_cli.engine.quant.state import LayerState, QuantState


def dequantized_weight(layer: LayerState) -> torch.Tensor:
    """The float weight that the layer multiplies its input with, in f32 and the weight's shape."""
    weight = dequantize(layer.codes, QParams(layer.weight_scale, layer.weight_zero_point.float()), weight_granularity(layer.decision))
    return weight if layer.own_factors is None else weight * per_input(layer.own_factors, weight)


def layer_rows(state: QuantState) -> list[dict[str, Any]]:
    """One row per Linear and Conv2d, quantized ones first, as the manifest stores them."""
    rows = []
    for name, layer in state.layers.items():
        d = layer.decision
        rows.append(
            {
                "name": name,
                "type": d.type,
                "shape": list(d.shape),
                "role": d.role,
                "bits_w": d.bits_w,
                "bits_a": d.bits_a,
                "granularity": d.granularity,
                "group": d.group_size,
                "symmetric": d.symmetric,
                "split": d.split,
                "pre_scale": d.pre_scale,
                "folded_into": d.folded_into,
                "timestep_rows": 0 if layer.act_scale is None else len(layer.act_scale),
                "rule": d.rule,
                "skipped_why": None,
            }
        )
    rows += [
        {"name": d.name, "type": d.type, "shape": list(d.shape), "role": d.role, "rule": d.rule, "skipped_why": d.skipped_why}
        for d in state.skipped
    ]
    return rows


def weight_metrics(denoiser: nn.Module, state: QuantState) -> dict[str, Any]:
    """`bit_metrics`, and the SQNR of all quantized weights together, in dB."""
    signal = noise = 0.0
    for name, layer in state.layers.items():
        factors = None if layer.decision.pre_scale else layer.pre_scale
        weight = weight_before_codes(denoiser.get_submodule(name).weight.cpu(), factors)  # type: ignore[operator]
        signal += float(weight.square().sum())
        noise += float((weight - dequantized_weight(layer)).square().sum())
    return {"weight_sqnr_db": 10 * torch.tensor(signal / max(noise, 1e-30)).log10().item(), **bit_metrics(state)}


def bit_metrics(state: QuantState) -> dict[str, Any]:
    """Mean bits per weight of the whole denoiser's layers, and the share of weights that are quantized."""
    count = sum(layer.decision.numel for layer in state.layers.values())
    bits = sum(layer.decision.bits_w * layer.decision.numel for layer in state.layers.values())
    kept = sum(d.numel for d in state.skipped)
    return {"mean_bits": (bits + 16 * kept) / max(1.0, count + kept), "quantized_share": count / max(1.0, count + kept)}
