"""A denoiser as two functions: the full forward that also gives the cut's tensor, and the partial one that starts from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.runtime import blocks, unet
from qdm_cli.engine.caching.runtime.shadow import Slot
from qdm_cli.engine.caching.schedule import Cut
from qdm_cli.engine.errors import InputError

SHALLOW = 3
"""Skip branches that are tried by default: deeper ones save too little (caching spec 4.1)."""


def candidate_cuts(denoiser: nn.Module) -> list[Cut]:
    """Cuts worth trying, cheapest partial call first: m = 1, 2, 3 of a U-Net; the blocks behind the 8th of a transformer.

    Raises:
        InputError: the model has no place to cut.
    """
    if blocks.is_transformer(denoiser):
        return [blocks.block_cut(denoiser, min(blocks.DEFAULT_FIRST, len(blocks.block_list(denoiser)) // 2))]
    if why := unet.why_no_unet(denoiser):
        raise InputError(f"cache: {why}; cuts exist for U-Nets with skip branches and for {', '.join(blocks.CLASSES)}")
    return [unet.unet_cut(denoiser, m) for m in range(1, min(SHALLOW, unet.depth(denoiser)) + 1)]


def find_cut(denoiser: nn.Module, place: int | tuple[int, int | None]) -> Cut:
    """The cut at a place as recipes write it: m of a U-Net, or the range of a transformer's blocks.

    Raises:
        InputError: the model has no such place.
    """
    if isinstance(place, int):
        return unet.unet_cut(denoiser, place)
    return blocks.block_cut(denoiser, *place)


class SplitDenoiser:
    """`denoiser` cut at `cut`. The model itself is not changed; both halves share its layers.

    Hooks on the model itself (the step context of quantized layers) run for both functions, as when the model is called.

    Raises:
        InputError: the model has no such cut.
    """

    def __init__(self, denoiser: nn.Module, cut: Cut):
        self.denoiser = denoiser
        self.cut = cut
        self._slot = Slot()
        make = unet.split_unet if cut.kind == "unet_up" else blocks.split_blocks
        self.full_model, self.partial_model = make(denoiser, cut, self._slot)

    def full(self, *args: Any, **kwargs: Any) -> tuple[Any, torch.Tensor]:
        """(what the model returns, bit for bit; the cut's tensor). The tensor must not be written to."""
        return self.run_full(self.full_model, args, kwargs)

    def partial(self, feature: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the model would return if the cut's tensor were `feature`, which is not written to."""
        return self.run_partial(self.partial_model, feature, args, self.partial_arguments(kwargs))

    def run_full(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, torch.Tensor]:
        """`full` by way of `call`: the full model, its bare forward, or a compiled form of either."""
        output = call(*args, **kwargs)
        return output, self._slot.take()

    def run_partial(self, call: Callable[..., Any], feature: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`partial` by way of `call`; `kwargs` as `partial_arguments` gives them."""
        self._slot.value = feature
        output = call(*args, **kwargs)
        self._slot.value = None
        return output

    def partial_arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Keyword arguments without what belongs to layers that a partial call does not run."""
        return unet.partial_arguments(self.denoiser, self.cut, kwargs) if self.cut.kind == "unet_up" else kwargs

    def why_not_partial(self, kwargs: dict[str, Any]) -> str | None:
        """Why a call with these arguments must be computed in full; None = it can be partial."""
        return None if self.cut.kind == "unet_up" else blocks.why_not_partial(kwargs)
