"""Puts a quantized state into a float denoiser: simulated integer arithmetic on the exact codes."""

from __future__ import annotations

import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.attention import attach_attention_
from qdm_cli.engine.quant.grid import IntGrid
from qdm_cli.engine.quant.low_rank import attach_low_rank_
from qdm_cli.engine.quant.modules import CodedWeight, StepScales, build_layer
from qdm_cli.engine.quant.scale_set import check_base
from qdm_cli.engine.quant.state import LayerState, QuantState


def apply_state_(denoiser: nn.Module, state: QuantState) -> StepContext:
    """Replace the layers of `state` by simulated ones and load its trained float parameters; the step hook is attached.

    Raises:
        InputError: the state belongs to another model, or its scales to another state.
    """
    if state.scales is not None:
        from qdm_cli.engine.quant.scale_layers import build_scaled_, state_digest

        check_base(state.scales, state_digest(state), type(denoiser).__name__)
        return build_scaled_(denoiser, state, state.scales)[1]
    step = StepContext(state.step_keys, state.row_mode)
    originals = {name: checked_layer(denoiser, name, layer) for name, layer in state.layers.items()}
    for name, layer in state.layers.items():
        original = originals[name]
        quantized = build_layer(original, layer.decision, CodedWeight(layer), layer.bias, scales_of(layer), step, layer.own_factors)
        replace_(denoiser, name, quantized.to(_device_of(original)))
    attach_low_rank_(denoiser, state.low_rank, originals)
    load_floats_(denoiser, state.floats)
    attach_attention_(denoiser, state, step)
    step.attach(denoiser)
    return step


def _device_of(layer: nn.Module) -> torch.device:
    """Where a layer's weight lies; the CPU for one without contents."""
    device: torch.device = layer.weight.device  # type: ignore[union-attr, assignment]
    return torch.device("cpu") if device.type == "meta" else device


def scales_of(layer: LayerState) -> StepScales | None:
    """Activation tables of a layer; None = dynamic or float activations."""
    if layer.act_scale is None or layer.act_zero_point is None or layer.decision.bits_a is None:
        return None
    return StepScales(layer.act_scale, layer.act_zero_point, IntGrid(layer.decision.bits_a), symmetric=layer.decision.act_symmetric)


def checked_layer(denoiser: nn.Module, name: str, layer: LayerState) -> nn.Module:
    """The float layer that `layer` was made from.

    Raises:
        InputError: no such layer, or another shape.
    """
    kind = type(denoiser).__name__
    try:
        original = denoiser.get_submodule(name)
    except AttributeError:
        raise InputError(f"The quantized state has a layer '{name}' that {kind} lacks: it belongs to another model.") from None
    own, stored = tuple(original.weight.shape), tuple(layer.codes.shape)  # type: ignore[union-attr, arg-type]
    if own != stored:
        raise InputError(f"'{name}' has shape {own} in the model and {stored} in the quantized state.")
    return original


def replace_(denoiser: nn.Module, name: str, layer: nn.Module) -> None:
    """Put `layer` at a module path."""
    parent, _, leaf = name.rpartition(".")
    setattr(denoiser.get_submodule(parent), leaf, layer)


def load_floats_(denoiser: nn.Module, floats: dict[str, torch.Tensor]) -> None:
    """Put changed parameters that lie outside quantized layers in place of those of `denoiser`, which another model may share."""
    own = dict(denoiser.named_parameters())
    for name, value in floats.items():
        if name not in own:
            raise InputError(f"The quantized state has a parameter '{name}' that {type(denoiser).__name__} lacks.")
        path, _, leaf = name.rpartition(".")
        changed = nn.Parameter(value.detach().to(own[name]), requires_grad=own[name].requires_grad)
        setattr(denoiser.get_submodule(path), leaf, changed)
