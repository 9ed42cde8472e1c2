"""Where a U-Net concatenates deep features with skip features (Q-Diffusion, section 3.3; quantization spec 3.1, point 4)."""

from __future__ import annotations

from torch import nn


def shortcut_splits(denoiser: nn.Module) -> dict[str, int]:
    """Shortcut convolutions that read a concatenation: module path -> channels of its first, deep part. Works on the meta device.

    Only the 1x1 shortcut sees the raw concatenation; the first 3x3 convolution of the block sees it normalised.
    """
    splits = {}
    for stage, block in enumerate(getattr(denoiser, "up_blocks", None) or []):
        for index, resnet in enumerate(getattr(block, "resnets", None) or []):
            shortcut = getattr(resnet, "conv_shortcut", None)
            before = block.resnets[index - 1] if index else _last_resnet_before(denoiser, stage)
            deep = getattr(before, "out_channels", None)
            if isinstance(shortcut, nn.Conv2d) and isinstance(deep, int) and 0 < deep < shortcut.in_channels:
                splits[f"up_blocks.{stage}.resnets.{index}.conv_shortcut"] = deep
    return splits


def _last_resnet_before(denoiser: nn.Module, stage: int) -> nn.Module | None:
    """The residual block whose output enters an up-sampling stage first; up-sampling keeps the number of channels."""
    middle = getattr(denoiser, "mid_block", None)
    place = denoiser.up_blocks[stage - 1] if stage else middle if middle is not None else denoiser.down_blocks[-1]  # type: ignore[index, union-attr]
    resnets = getattr(place, "resnets", None)
    return resnets[-1] if resnets else None
