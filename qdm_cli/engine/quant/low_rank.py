"""Low-rank updates that stay beside an integer weight (QLoRA): y = layer(x) + up(down(x)), in floats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdm_cli.engine.checkpoint import read_tensors, write_tensors

ADAPTERS_FILE = "adapters.safetensors"


@dataclass(frozen=True)
class LowRank:
    """Update of one layer's weight.

    Attributes:
        down: f32 [r, K], or [r, I, kh, kw] of a convolution.
        up: f32 [O, r], or [O, r, 1, 1]; the scaling of the method is in it.
    """

    down: Tensor
    up: Tensor

    def weight(self) -> Tensor:
        """up * down in the weight's shape."""
        return torch.einsum("or,r...->o...", self.up.flatten(1), self.down)


class LowRankLayer(nn.Module):
    """A quantized layer with a low-rank update beside it.

    Args:
        base: the quantized layer.
        update: of its weight.
        conv: stride, padding and dilation of a convolution; None = linear.
    """

    def __init__(self, base: nn.Module, update: LowRank, conv: tuple[Any, Any, Any] | None):
        super().__init__()
        self.base, self.conv = base, conv
        self.register_buffer("down", update.down.float())
        self.register_buffer("up", update.up.float())

    @property
    def update(self) -> LowRank:
        return LowRank(cast(Tensor, self.down), cast(Tensor, self.up))

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """x: [..., K] or [B, I, H, W] float -> the same dtype. `unused`: diffusers passes a LoRA scale to some layers."""
        down, up = self.update.down.to(x.dtype), self.update.up.to(x.dtype)
        if self.conv is None:
            return self.base(x) + F.linear(F.linear(x, down), up)
        return self.base(x) + F.conv2d(F.conv2d(x, down, None, *self.conv), up)


def attach_low_rank_(denoiser: nn.Module, updates: dict[str, LowRank], geometry: dict[str, nn.Module]) -> None:
    """Put updates beside the layers of their names.

    Args:
        geometry: the float layers that the quantized ones were made from.
    """
    for name, update in updates.items():
        original, base = geometry[name], denoiser.get_submodule(name)
        conv = (original.stride, original.padding, original.dilation) if isinstance(original, nn.Conv2d) else None
        parent, _, leaf = name.rpartition(".")
        setattr(denoiser.get_submodule(parent), leaf, LowRankLayer(base, update, conv).to(original.weight.device))  # type: ignore[arg-type]


def write_low_rank(path: Path, updates: dict[str, LowRank]) -> None:
    """Write one safetensors file."""
    tensors = {f"{name}:{part}": getattr(update, part) for name, update in updates.items() for part in ("down", "up")}
    write_tensors(path, tensors, {"kind": "low-rank updates"})


def read_low_rank(path: Path) -> dict[str, LowRank]:
    """Read what `write_low_rank` wrote."""
    tensors = read_tensors(path)[0]
    names = [key.removesuffix(":up") for key in tensors if key.endswith(":up")]
    return {name: LowRank(tensors[f"{name}:down"], tensors[f"{name}:up"]) for name in names}
