"""Denoisers of published models, from their configurations alone: right shapes, seeded random weights, nothing downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True)
class Published:
    """class_name: of diffusers. parameters: their number. side: height and width of the latents."""

    class_name: str
    config: dict[str, Any]
    parameters: int
    side: int


_DIT = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "patch_size": 2,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
_SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_LDM4 = {
    "sample_size": 64,
    "in_channels": 3,
    "out_channels": 3,
    "cross_attention_dim": 512,
    "attention_head_dim": [6, 12, 18, 30],  # diffusers means heads by this name; 32 channels each
    "block_out_channels": [192, 384, 576, 960],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
_UNET, _TRANSFORMER, _FLUX = "UNet2DConditionModel", "DiTTransformer2DModel", "FluxTransformer2DModel"

CONFIGS: dict[str, Published] = {
    "sd15": Published(_UNET, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, 859_520_964, 64),
    "sdxl": Published(_UNET, _SDXL, 2_567_463_684, 128),
    "ldm4": Published(_UNET, _LDM4, 400_920_579, 64),
    "dit256": Published(_TRANSFORMER, {**_DIT, "sample_size": 32}, 749_826_464, 32),
    "dit512": Published(_TRANSFORMER, {**_DIT, "sample_size": 64}, 749_826_464, 64),
    "flux": Published(_FLUX, {"guidance_embeds": True}, 11_901_408_320, 128),
}


def build_published(name: str) -> nn.Module:
    """The denoiser of `CONFIGS[name]` in fp32 on the default device, the same weights on every call."""
    import diffusers

    entry = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(diffusers, entry.class_name)(**entry.config)


@torch.no_grad()
def build_published_on(name: str, device: str, dtype: torch.dtype) -> nn.Module:
    """The denoiser of `CONFIGS[name]` with seeded random weights drawn on the device itself: 12 billion of them in seconds.

    Tables that the class computes, such as position embeddings, are random too.
    """
    import diffusers

    entry = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(diffusers, entry.class_name)(**entry.config).to(dtype)
    model = model.to_empty(device=device).eval().requires_grad_(False)
    rng = torch.Generator(device).manual_seed(0)
    for key, value in model.named_parameters():
        if value.ndim > 1:
            value.normal_(0, value[0].numel() ** -0.5, generator=rng)
        elif key.endswith("weight"):
            value.uniform_(0.9, 1.1, generator=rng)
        else:
            value.normal_(0, 0.02, generator=rng)
    for value in model.buffers():
        if value.is_floating_point():
            value.normal_(0, 0.5, generator=rng)
        else:
            value.zero_()
    return model.to(memory_format=torch.channels_last)
