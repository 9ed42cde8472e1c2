"""Weights in memory of their own."""

from __future__ import annotations

from torch import nn

_ALIGNMENT = 64


def align_(module: nn.Module) -> None:
    """Copy CPU weights and buffers that do not start at a multiple of 64 bytes, such as those mapped from a safetensors file.

    The matrix products of one and the same weight differ in the last bits (1e-6 in images) with its alignment, so without the copy a
    model would not give equal results when built, saved and loaded again.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % _ALIGNMENT:
            tensor.data = tensor.data.clone()
