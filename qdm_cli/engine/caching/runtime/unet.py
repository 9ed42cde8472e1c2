"""DeepCache's cut (arXiv 2312.00858, section 3): the main-branch input of up-layer m of any U-Net of diffusers, found by its structure.

Down layers are numbered D_1 .. D_d: `conv_in` is D_1, then every residual layer (with its attention) and every downsampler; up layer U_i
reads the skip of D_i. A partial call is the model's own forward on a shallower U-Net that shares the layers: D_1 .. D_m, the kept tensor in
place of the middle, U_m .. U_1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.runtime.shadow import Slot, inner_shadow, shadow
from qdm_cli.engine.caching.schedule import Cut
from qdm_cli.engine.errors import InputError

_NOT_LAYERS = ("downsamplers", "upsamplers")


@dataclass(frozen=True)
class Boundary:
    """Where a cut falls in one half of a U-Net: `blocks` whole blocks are executed, and of the next one `layers` layers."""

    blocks: int
    layers: int


def is_unet(denoiser: nn.Module) -> bool:
    """Whether the model has the structure that `unet_up` cuts."""
    return why_no_unet(denoiser) is None


def why_no_unet(denoiser: nn.Module) -> str | None:
    """Why a model cannot be cut at its skip branches; None = it can."""
    name = type(denoiser).__name__
    if not all(hasattr(denoiser, part) for part in ("conv_in", "down_blocks", "mid_block", "up_blocks")):
        return f"{name} has no skip branches (no conv_in, down_blocks, mid_block, up_blocks)"
    blocks = [*denoiser.down_blocks, *denoiser.up_blocks]
    if not all(isinstance(getattr(block, "resnets", None), nn.ModuleList) for block in blocks):
        return f"{name}: a block without a list of residual layers"
    if odd := [type(block).__name__ for block in blocks if hasattr(block, "skip_conv") or type(block).__name__.startswith("K")]:
        return f"{name}: {odd[0]} carries more than one tensor between up layers"
    if len(down_channels(denoiser)) != depth(denoiser):
        return f"{name}: {len(down_channels(denoiser))} down layers for {depth(denoiser)} up layers"
    return None


def depth(denoiser: nn.Module) -> int:
    """d, the number of skip branches."""
    return sum(len(block.resnets) for block in denoiser.up_blocks)


def down_channels(denoiser: nn.Module) -> list[int]:
    """Channels of the skips D_1 .. D_d."""
    channels = [denoiser.config["block_out_channels"][0]]  # a packed conv_in does not say
    for block in denoiser.down_blocks:
        channels += [resnet.out_channels for resnet in block.resnets]
        channels += [channels[-1]] if block.downsamplers is not None else []
    return channels


def unet_cut(denoiser: nn.Module, m: int) -> Cut:
    """The cut at up-layer m with the shape of its tensor: [N, channels, H / downscale, W / downscale].

    Raises:
        InputError: no U-Net with skip branches, or m out of range.
    """
    if why := why_no_unet(denoiser):
        raise InputError(f"cut m={m}: {why}")
    if not 1 <= m <= depth(denoiser):
        raise InputError(f"cut m={m}: {type(denoiser).__name__} has the skip branches 1 to {depth(denoiser)}")
    down, up = _down_boundary(denoiser, m), _up_boundary(denoiser, m)
    block = denoiser.up_blocks[len(denoiser.up_blocks) - 1 - up.blocks]
    channels = block.resnets[len(block.resnets) - up.layers].in_channels - down_channels(denoiser)[m - 1]
    halvings = sum(block.downsamplers is not None for block in list(denoiser.down_blocks)[: down.blocks])
    return Cut(id=f"up{m}", kind="unet_up", m=m, channels=channels, downscale=2**halvings)


def _down_boundary(denoiser: nn.Module, m: int) -> Boundary:
    """D_1 .. D_m after `conv_in`: whole blocks, then layers of the next."""
    left = m - 1
    for index, block in enumerate(denoiser.down_blocks):
        size = len(block.resnets) + (block.downsamplers is not None)
        if left < size:
            return Boundary(index, left)
        left -= size
    return Boundary(len(denoiser.down_blocks), 0)


def _up_boundary(denoiser: nn.Module, m: int) -> Boundary:
    """U_m .. U_1 from the output backwards: whole blocks that do not hold U_m, then the last layers of the block that does."""
    left = m
    for index, block in enumerate(reversed(denoiser.up_blocks)):
        if left <= len(block.resnets):
            return Boundary(index, left)
        left -= len(block.resnets)
    raise AssertionError("m was checked")


class _Kept(nn.Module):
    """Stands where the middle block stood and answers with the kept tensor."""

    def __init__(self, slot: Slot, clone: bool):
        super().__init__()
        self.slot = slot
        self.clone = clone

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.slot.value.clone() if self.clone else self.slot.value


def split_unet(denoiser: nn.Module, cut: Cut, slot: Slot) -> tuple[nn.Module, nn.Module]:
    """(model that puts the cut tensor into `slot`, model that reads it from there); both share the layers of `denoiser`.

    Raises:
        InputError: as `unet_cut`.
    """
    assert cut.m is not None
    unet_cut(denoiser, cut.m)
    up = _up_boundary(denoiser, cut.m)
    position = len(denoiser.up_blocks) - 1 - up.blocks
    block = denoiser.up_blocks[position]
    first = len(block.resnets) - up.layers
    # FreeU scales the main branch in place
    clone = getattr(block, "s1", None) is not None

    full = shadow(denoiser)
    blocks = list(denoiser.up_blocks)
    blocks[position] = _watched(block, first, _keeper(slot, clone))
    full.up_blocks = nn.ModuleList(blocks)

    partial = shadow(denoiser)
    partial.down_blocks = nn.ModuleList(_first_layers(denoiser, _down_boundary(denoiser, cut.m)))
    partial.mid_block = _Kept(slot, clone)
    partial.up_blocks = nn.ModuleList([_sliced(block, slice(first, None)), *list(denoiser.up_blocks)[position + 1 :]])
    return full, partial


def _keeper(slot: Slot, clone: bool) -> Callable[[torch.Tensor], None]:
    def keep(value: torch.Tensor) -> None:
        slot.value = value.clone() if clone else value

    return keep


def _watched(block: nn.Module, first: int, keep: Callable[[torch.Tensor], None]) -> nn.Module:
    """The block, reporting the main-branch input of layer `first`: its own input, or the output of the layer before."""
    twin = inner_shadow(block)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(kwargs["hidden_states"] if "hidden_states" in kwargs else args[0])

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        keep(output[0] if isinstance(output, tuple) else output)

    if first == 0:
        twin.register_forward_pre_hook(before, with_kwargs=True)
        return twin
    for name in _layer_lists(block):
        # residual, attention, motion module: whichever runs last in the layer is kept
        layers = list(getattr(block, name))
        layers[first - 1] = inner_shadow(layers[first - 1])
        layers[first - 1].register_forward_hook(after, with_kwargs=True)
        setattr(twin, name, nn.ModuleList(layers))
    return twin


def _layer_lists(block: nn.Module) -> list[str]:
    """Names of the lists that hold one module per layer."""
    return [
        name
        for name, child in block.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == len(block.resnets) and name not in _NOT_LAYERS
    ]


def _sliced(block: nn.Module, chosen: slice) -> nn.Module:
    """The block with these layers alone."""
    twin = inner_shadow(block)
    for name in _layer_lists(block):
        setattr(twin, name, getattr(block, name)[chosen])
    return twin


def _first_layers(denoiser: nn.Module, boundary: Boundary) -> list[nn.Module]:
    blocks = list(denoiser.down_blocks)
    chosen = blocks[: boundary.blocks]
    if boundary.layers:
        last = _sliced(blocks[boundary.blocks], slice(None, boundary.layers))
        last.downsamplers = None
        chosen.append(last)
    return chosen


def partial_arguments(denoiser: nn.Module, cut: Cut, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a partial call: residuals of ControlNet and T2I-Adapter for layers that do not run are left out (caching spec 5.7)."""
    assert cut.m is not None
    middle, down = kwargs.get("mid_block_additional_residual"), kwargs.get("down_block_additional_residuals")
    inside = kwargs.get("down_intrablock_additional_residuals")
    own = dict(kwargs)
    if middle is not None:
        own["mid_block_additional_residual"] = torch.zeros((), dtype=middle.dtype, device=middle.device)  # part of the kept tensor
    whole = _adapter_residuals(denoiser, _down_boundary(denoiser, cut.m))
    if inside is not None:
        own["down_intrablock_additional_residuals"] = list(inside)[:whole]
    elif down is not None and middle is None:  # diffusers' older name for the adapter's residuals
        own["down_block_additional_residuals"] = list(down)[:whole]
    return own


def _adapter_residuals(denoiser: nn.Module, boundary: Boundary) -> int:
    """How many of T2I-Adapter's residuals belong to layers that run: blocks with cross-attention add theirs before their downsampler."""
    if not boundary.layers:
        return boundary.blocks
    block = denoiser.down_blocks[boundary.blocks]
    added = boundary.layers == len(block.resnets) and getattr(block, "has_cross_attention", False)
    return boundary.blocks + int(added)
