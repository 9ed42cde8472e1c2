"""The transformers' cut: what blocks a .. b-1 add to the token stream (Delta-DiT, arXiv 2406.01125, in its plain form).

Blocks are numbered through all lists of the model (FLUX: double blocks, then single ones). Models that carry text and image tokens side by
side keep one tensor: the image tokens' residual when b is the end (text tokens are not read after it), else text and image tokens in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.runtime.shadow import Slot, inner_shadow, shadow
from qdm_cli.engine.caching.schedule import Cut
from qdm_cli.engine.errors import InputError

LISTS = ("transformer_blocks", "single_transformer_blocks")
CLASSES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel")
"""Their blocks return the image tokens, or (text tokens, image tokens)."""
DEFAULT_FIRST = 8
"""First replaced block of a deep transformer (DiT-XL/2 has 28)."""

_INDEXED = ("block_controlnet_hidden_states", "controlnet_block_samples", "controlnet_single_block_samples", "skip_layers")
"""Arguments that name blocks by position."""


def is_transformer(denoiser: nn.Module) -> bool:
    """Whether the model can be cut into blocks."""
    return type(denoiser).__name__ in CLASSES


def block_list(denoiser: nn.Module) -> list[nn.Module]:
    """All blocks in order of execution."""
    return [block for name in LISTS for block in getattr(denoiser, name, ())]


def block_cut(denoiser: nn.Module, first: int, end: int | None = None) -> Cut:
    """The cut that replaces blocks [first, end); end None = all remaining.

    Raises:
        InputError: no such transformer, or an empty or impossible range.
    """
    if not is_transformer(denoiser):
        raise InputError(f"{type(denoiser).__name__} has no block cut; known are {', '.join(CLASSES)}")
    count = len(block_list(denoiser))
    if not 0 <= first < (count if end is None else end) <= count:
        raise InputError(f"cut range [{first}, {end}): {type(denoiser).__name__} has the blocks 0 to {count - 1}")
    last = None if end == count else end
    name = f"blocks{first}_{'end' if last is None else last}"
    return Cut(id=name, kind="block_residual", range=(first, last), channels=width(denoiser))


def width(denoiser: nn.Module) -> int:
    """Channels of a token."""
    config = denoiser.config
    return int(config["num_attention_heads"] * config["attention_head_dim"])


def split_blocks(denoiser: nn.Module, cut: Cut, slot: Slot) -> tuple[nn.Module, nn.Module]:
    """(model that puts the residual into `slot`, model that adds it from there); both share the layers of `denoiser`.

    Raises:
        InputError: as `block_cut`.
    """
    assert cut.range is not None
    first, end = cut.range
    block_cut(denoiser, first, end)
    blocks = block_list(denoiser)
    stop = len(blocks) if end is None else end
    streams = _Streams(pair=any(hasattr(block, "norm1_context") for block in blocks), with_text=stop < len(blocks))

    watched = list(blocks)
    for index in {first, stop - 1}:
        watched[index] = inner_shadow(blocks[index])
    _watch(watched[first], watched[stop - 1], streams, slot)
    kept = _kept(blocks[first], streams, slot)
    return _with_blocks(denoiser, watched, 0, 0), _with_blocks(denoiser, [*blocks[:first], kept, *blocks[stop:]], first, stop - first - 1)


def _with_blocks(denoiser: nn.Module, blocks: list[nn.Module], first: int, removed: int) -> nn.Module:
    """The model with these blocks, dealt out to its lists; `removed` blocks after `first` are gone."""
    twin, start, taken = shadow(denoiser), 0, 0
    for name in LISTS:
        size = len(getattr(denoiser, name, ()))
        if not size:
            continue
        # of the `removed` blocks that followed `first`, those that lay in this list
        gone = max(0, min(start + size, first + 1 + removed) - max(start, first + 1))
        setattr(twin, name, nn.ModuleList(blocks[taken : taken + size - gone]))
        start, taken = start + size, taken + size - gone
    return twin


class _Streams:
    """Which token streams the blocks carry and which of them a cut keeps. pair: (text, image) instead of one stream."""

    def __init__(self, *, pair: bool, with_text: bool):
        self.pair = pair
        self.with_text = pair and with_text

    def inputs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor | None, torch.Tensor]:
        """(text tokens or None, image tokens) of a block call."""
        image = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not self.pair:
            return None, image
        return kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1], image

    def residual(self, before: tuple[Any, torch.Tensor], output: Any) -> torch.Tensor:
        text, image = output if self.pair else (None, output)
        return torch.cat([text - before[0], image - before[1]], 1) if self.with_text else image - before[1]

    def add(self, before: tuple[Any, torch.Tensor], kept: torch.Tensor) -> Any:
        text, image = before
        if not self.pair:
            return image + kept
        if not self.with_text:
            return text, image + kept
        length = text.shape[1]
        return text + kept[:, :length], image + kept[:, length:]


def _watch(first: nn.Module, last: nn.Module, streams: _Streams, slot: Slot) -> None:
    start = Slot()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start.value = streams.inputs(args, kwargs)

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        slot.value = streams.residual(start.take(), output)

    first.register_forward_pre_hook(before, with_kwargs=True)
    last.register_forward_hook(after, with_kwargs=True)


def _kept(block: nn.Module, streams: _Streams, slot: Slot) -> nn.Module:
    """Stands where the first replaced block stood; keeps that block's parts, because models read them (DiT: the time embedding)."""
    twin = inner_shadow(block)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return streams.add(streams.inputs(args, kwargs), slot.value)

    twin.forward = forward
    return twin


def why_not_partial(kwargs: dict[str, Any]) -> str | None:
    """Why a call must be computed in full; None = it can be partial."""
    found = next((name for name in _INDEXED if kwargs.get(name) is not None), None)
    return None if found is None else f"{found} names blocks that a partial call does not run"
