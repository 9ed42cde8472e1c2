"""What precedes a packed layer on a GPU, and the sum after it, inside the kernels that read and write there anyway.

Each function has two forms: codes for a layer that takes them, or the plain operators of diffusers for one that does not. Fused, values
are rounded once where diffusers rounds to the denoiser's dtype between operators; codes are otherwise those of the plain form.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import SharedInput
from qdm_kernels.gelu_quantize.op import gelu_quantize
from qdm_kernels.group_norm_quantize.op import group_norm_quantize
from qdm_kernels.layer_norm_quantize.op import layer_norm_quantize
from qdm_kernels.quantize.op import quantize

Tables = tuple[Tensor, Tensor, Tensor | None]


def tables_for(layer: nn.Module | None, device: torch.device) -> Tables | None:
    """(scale, zero point, step) of a layer that can be handed codes now; None = it wants floats."""
    if not isinstance(layer, PackedLayer) or layer.mode != "auto" or not gpu.is_gpu(layer.weight.device):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:  # who watches a layer wants to see what it reads
        return None
    return gpu.tables(layer, device) if layer.form.choice.kernel == "integer" else None


def _options(layer: nn.Module | None, step: Tensor | None) -> dict[str, Any]:
    packed = cast(PackedLayer, layer)
    return {"gain": packed._buffers["pre_scale"], "step": step, "bits": packed.spec.bits_a}


def group_norm(norm: nn.GroupNorm, x: Tensor, layer: nn.Module | None, *, silu: bool) -> Tensor:
    """What `layer` reads of x [B, C, H, W]: codes channels_last, or floats."""
    found = tables_for(layer, x.device)
    if found is None:
        y = norm(x)
        return F.silu(y) if silu else y
    scale, zero, step = found
    options = _options(layer, step) | {"weight": norm.weight, "bias": norm.bias, "eps": norm.eps, "activation": "silu" if silu else "none"}
    return group_norm_quantize(x, norm.num_groups, scale, zero, **options)


def layer_norm(norm: nn.Module, x: Tensor, layer: nn.Module | None, modulation: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """What `layer` reads of x [B, L, K]: codes, or floats. modulation: (scale, shift), each [B, K]: y (1 + scale) + shift."""
    found = tables_for(layer, x.device) if isinstance(norm, nn.LayerNorm) and len(norm.normalized_shape) == 1 else None
    if found is None:
        y = norm(x)
        return y if modulation is None else y * (1 + modulation[0][:, None]) + modulation[1][:, None]
    plain = cast(nn.LayerNorm, norm)
    scale, zero, step = found
    options = _options(layer, step) | {"weight": plain.weight, "bias": plain.bias, "eps": plain.eps}
    return layer_norm_quantize(x, scale, zero, modulation=modulation, **options)


def gelu(x: Tensor, layer: nn.Module, *, gated: bool, approximate: str) -> Tensor:
    """What `layer` reads of gelu(x), or of value * gelu(gate) for x = [value, gate]."""
    found = tables_for(layer, x.device)
    if found is None:
        value, gate = x.chunk(2, dim=-1) if gated else (None, x)
        activated = F.gelu(gate, approximate=approximate)
        return activated if value is None else value * activated
    scale, zero, step = found
    return gelu_quantize(x, scale, zero, gated=gated, approximate=approximate, **_options(layer, step))


def codes(x: Tensor, layer: nn.Module) -> Tensor:
    """x as `layer` reads it."""
    found = None if x.dtype == torch.int8 else tables_for(layer, x.device)
    if found is None or cast(PackedLayer, layer)._buffers["pre_scale"] is not None:
        return x
    scale, zero, step = found
    return quantize(x, scale, zero, cast(int, cast(PackedLayer, layer).spec.bits_a), step)


def add(layer: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """layer(x) + residual, rounded once."""
    x = codes(x, layer)
    if x.dtype != torch.int8:
        return layer(x) + residual
    return _multiply(layer, x, residual.dtype, residual=residual)


def gelu_layer(first: nn.Module, second: nn.Module, x: Tensor, approximate: str) -> Tensor:
    """What `second` reads of gelu(first(x)): codes that leave the product of `first` at once, where both layers have 8-bit codes."""
    found = _activated(first, second, x, "gelu_tanh" if approximate == "tanh" else "gelu")
    return gelu(first(x), second, gated=False, approximate=approximate) if found is None else found


def geglu_layer(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    """As `gelu_layer` of value * gelu(gate) for first(x) = [value, gate], which is never written."""
    found = _activated(first, second, x, "geglu")
    return gelu(first(x), second, gated=True, approximate="none") if found is None else found


def _activated(first: nn.Module, second: nn.Module, x: Tensor, activation: str) -> Tensor | None:
    """Codes of `second`; None = one of the two has none, or not of 8 bits, or factors of its inputs."""
    found, packed = tables_for(second, x.device), cast(PackedLayer, second)
    if found is None or packed.spec.bits_a != 8 or packed._buffers["pre_scale"] is not None:
        return None
    x = codes(x, first)
    if x.dtype != torch.int8:
        return None
    scale, zero, step = found
    return _multiply(first, x, torch.int8, step, activation=activation, out_scale=scale, out_zero_point=zero)


def _multiply(layer: nn.Module, x: Tensor, dtype: torch.dtype, step: Tensor | None = None, **epilogue: Any) -> Tensor:
    """The product of a layer's own codes. step: of tables in the epilogue; a kernel has one step for all its tables."""
    packed = cast(PackedLayer, layer)
    a = cast(gpu.Activation, gpu.activation(packed, x))
    a = gpu.Activation(a.codes, a.scale, a.zero_point, step if a.step is None else a.step)
    return gpu.multiply(packed, a, packed.form.prepared, dtype, **epilogue)


def together(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """Outputs of layers that read the same codes: one product where one operand holds them all."""
    first = cast(PackedLayer, layers[0])
    reuse = getattr(first, "reuse", None)
    joint = reuse.joint() if x.dtype == torch.int8 and isinstance(reuse, SharedInput) else None
    if joint is None:
        return tuple(layer(x) for layer in layers)
    a = cast(gpu.Activation, gpu.activation(first, x))
    whole = gpu.multiply(first, a, joint, gpu.output_dtype(first, x))
    return whole.split([cast(PackedLayer, layer).spec.outputs for layer in layers], -1)
