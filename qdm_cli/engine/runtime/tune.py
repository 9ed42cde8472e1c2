"""Makes a packed denoiser as fast as its machine allows, once, after its weights are in place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from qdm_cli.engine.models.roles import layer_roles
from qdm_cli.engine.quant.attention import AttentionProducts
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.attention import speed_up_attention_
from qdm_cli.engine.runtime.choice import Mode
from qdm_cli.engine.runtime.memory import keep_freed_memory
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.reuse import share_inputs_


def tune_(denoiser: nn.Module, mode: Mode) -> None:
    """Set how the layers of a denoiser choose their arithmetic, share what they compute twice, and lay images out as kernels read them.

    Results of `exact` do not depend on the machine; `auto` may take float kernels and attention of its own where those are faster.
    """
    # subclasses of diffusers, whose import registers qdm, which imports this file
    from qdm_cli.engine.runtime.fused import fuse_blocks_
    from qdm_cli.engine.runtime.gpu_blocks import fuse_gpu_blocks_

    few = {name for name, role in layer_roles(denoiser, PackedLayer).items() if role in gpu.FEW_ROW_ROLES}
    dtype = next((p.dtype for p in denoiser.parameters() if p.is_floating_point()), None)
    for name, layer in denoiser.named_modules():
        if isinstance(layer, PackedLayer):
            layer.set_mode_(mode)
            layer.place_(few_rows=name in few, dtype=dtype)
        elif isinstance(layer, AttentionProducts):
            layer.simulated = mode == "exact"
    share_inputs_(denoiser)
    for layer in denoiser.modules():
        if isinstance(layer, PackedLayer):
            layer.settle_()
    speed_up_attention_(denoiser, enabled=mode == "auto")
    fuse_gpu_blocks_(denoiser, enabled=False)
    fuse_blocks_(denoiser, enabled=mode == "auto")
    fuse_gpu_blocks_(denoiser, enabled=mode == "auto" and gpu.possible())
    if mode == "auto":
        if any(isinstance(layer, PackedLayer) and layer.weight.device.type == "cpu" for layer in denoiser.modules()):
            keep_freed_memory()
        for layer in denoiser.modules():
            if isinstance(layer, nn.Conv2d) and layer.weight.device.type != "meta":
                layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)


@contextmanager
def in_mode(denoiser: nn.Module, mode: Mode) -> Iterator[None]:
    """Run a block with the packed layers of a denoiser in `mode`; a model without packed layers is not touched."""
    before = {layer.mode for layer in denoiser.modules() if isinstance(layer, PackedLayer)}
    if not before or before == {mode}:
        yield
        return
    tune_(denoiser, mode)
    try:
        yield
    finally:
        tune_(denoiser, before.pop())
