"""Small U-Nets of every diffusers class with skip branches, and denoiser calls for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LEVELS = (4, 8, 8, 12)
SD_LIKE = {
    "sample_size": 8,
    "block_out_channels": LEVELS,
    "cross_attention_dim": 8,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def _call(width: int, channels: int, context: int | None = 8, frames: int | None = None, *, per_frame: bool = False) -> dict[str, Any]:
    import torch

    rng = torch.Generator().manual_seed(3)
    middle = () if frames is None else (frames,)
    call: dict[str, Any] = {"sample": torch.randn(2, channels, *middle, width, width, generator=rng), "timestep": torch.tensor(401)}
    if context is not None:
        call["encoder_hidden_states"] = torch.randn(2 * ((per_frame and frames) or 1), 5, context, generator=rng)
    return call


def _nets() -> dict[str, Callable[[], tuple[Any, dict[str, Any]]]]:
    """Name -> (model, arguments of a call)."""
    import diffusers as d

    def plain(**config: Any) -> Any:
        base = {"sample_size": 16, "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 4, "layers_per_block": 1}
        downs, ups = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
        return d.UNet2DModel(**{**base, "down_block_types": downs, "up_block_types": ups, **config}), _call(16, 3, None)

    def resampling_layers() -> Any:
        return plain(
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
            downsample_type="resnet",
            upsample_type="resnet",
        )

    def simple_cross() -> Any:
        config = {**SD_LIKE, "block_out_channels": (8, 16), "layers_per_block": 1, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}
        downs, ups = ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D")
        return d.UNet2DConditionModel(**config, down_block_types=downs, up_block_types=ups), _call(16, 4)

    def video() -> Any:
        config = {**SD_LIKE, "block_out_channels": (8, 16), "layers_per_block": 1, "attention_head_dim": 4}
        downs, ups = ("CrossAttnDownBlock3D", "DownBlock3D"), ("UpBlock3D", "CrossAttnUpBlock3D")
        return d.UNet3DConditionModel(**config, down_block_types=downs, up_block_types=ups), _call(8, 4, frames=3)

    def motion() -> Any:
        downs, ups = ("CrossAttnDownBlockMotion", "DownBlockMotion"), ("UpBlockMotion", "CrossAttnUpBlockMotion")
        config = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "cross_attention_dim": 8, "norm_num_groups": 4}
        extra = {"motion_num_attention_heads": 2, "num_attention_heads": 2}
        return d.UNetMotionModel(**config, **extra, down_block_types=downs, up_block_types=ups), _call(8, 4, frames=3, per_frame=True)

    return {
        "sd": lambda: (d.UNet2DConditionModel(**SD_LIKE), _call(8, 4)),
        "sd, odd size": lambda: (d.UNet2DConditionModel(**SD_LIKE), _call(10, 4)),
        "ddpm": plain,
        "ddpm without a middle": lambda: plain(mid_block_type=None),
        "resnet resampling": resampling_layers,
        "simple cross attention": simple_cross,
        "video": video,
        "motion": motion,
    }


@pytest.fixture
def make_net() -> Callable[[str], tuple[Any, dict[str, Any]]]:
    """`make_net(name)` -> (model in evaluation mode with random weights, arguments of a call)."""
    import torch

    def make(name: str) -> tuple[Any, dict[str, Any]]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            model, call = _nets()[name]()
            for parameter in model.parameters():
                if parameter.ndim > 1 and not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.05)  # a zero layer would hide what lies before it
        return model.eval().requires_grad_(False), call

    return make
