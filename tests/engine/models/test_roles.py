"""Roles of layers by name on the tiny families, and by count on the published full-size configurations."""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

import diffusers
import pytest
import torch
from accelerate import init_empty_weights
from torch import nn

from qdm_cli.engine.models import layer_roles
from qdm_cli.engine.models.tiny import TINY, tiny_denoiser
from qdm_cli.engine.quant.config import Role

_RESNET = {
    "conv_in": "input",
    "conv_out": "output",
    "time_embedding.linear_1": "time_embedding",
    "time_embedding.linear_2": "time_embedding",
    "down_blocks.0.resnets.0.conv1": "resnet",
    "down_blocks.0.resnets.0.conv2": "resnet",
    "down_blocks.0.resnets.0.time_emb_proj": "time_projection",
    "down_blocks.1.resnets.0.conv_shortcut": "shortcut",
    "up_blocks.0.resnets.1.conv_shortcut": "shortcut",
    "down_blocks.0.downsamplers.0.conv": "downsample",
    "up_blocks.0.upsamplers.0.conv": "upsample",
}
_TEXT_BLOCK = {
    "attentions.0.proj_in": "attention.projection",
    "attentions.0.proj_out": "attention.projection",
    "attentions.0.transformer_blocks.0.attn1.to_q": "attention.qkv",
    "attentions.0.transformer_blocks.0.attn1.to_k": "attention.qkv",
    "attentions.0.transformer_blocks.0.attn1.to_v": "attention.qkv",
    "attentions.0.transformer_blocks.0.attn1.to_out.0": "attention.out",
    "attentions.0.transformer_blocks.0.attn2.to_q": "attention.qkv",
    "attentions.0.transformer_blocks.0.attn2.to_k": "cross_attention.kv",
    "attentions.0.transformer_blocks.0.attn2.to_v": "cross_attention.kv",
    "attentions.0.transformer_blocks.0.attn2.to_out.0": "attention.out",
    "attentions.0.transformer_blocks.0.ff.net.0.proj": "mlp.in",
    "attentions.0.transformer_blocks.0.ff.net.2": "mlp.out",
}
_MIDDLE = {f"mid_block.{name}": role for name, role in _TEXT_BLOCK.items()}
_PLAIN = {
    "mid_block.attentions.0.to_q": "attention.qkv",
    "mid_block.attentions.0.to_k": "attention.qkv",
    "mid_block.attentions.0.to_v": "attention.qkv",
    "mid_block.attentions.0.to_out.0": "attention.out",
}
_JOINT = {
    "context_embedder": "input",
    "time_text_embed.timestep_embedder.linear_1": "time_embedding",
    "time_text_embed.text_embedder.linear_2": "class_embedding",
    "transformer_blocks.0.norm1.linear": "modulation",
    "transformer_blocks.0.norm1_context.linear": "modulation",
    "transformer_blocks.0.attn.to_k": "attention.qkv",
    "transformer_blocks.0.attn.add_k_proj": "attention.qkv",
    "transformer_blocks.0.attn.to_out.0": "attention.out",
    "transformer_blocks.0.attn.to_add_out": "attention.out",
    "transformer_blocks.0.ff.net.0.proj": "mlp.in",
    "transformer_blocks.0.ff_context.net.2": "mlp.out",
    "norm_out.linear": "modulation",
    "proj_out": "output",
}
EXPECTED: dict[str, dict[str, str]] = {
    "ddpm": _RESNET | _PLAIN,
    "fashion": _RESNET | _PLAIN,
    "ldm": _RESNET | _PLAIN,
    "sd": _RESNET | _MIDDLE,
    "sdxl": _RESNET | _MIDDLE | {"add_embedding.linear_1": "class_embedding", "add_embedding.linear_2": "class_embedding"},
    "dit": {
        "pos_embed.proj": "input",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "time_embedding",
        "transformer_blocks.1.norm1.linear": "modulation",
        "transformer_blocks.1.attn1.to_v": "attention.qkv",
        "transformer_blocks.1.attn1.to_out.0": "attention.out",
        "transformer_blocks.1.ff.net.0.proj": "mlp.in",
        "transformer_blocks.1.ff.net.2": "mlp.out",
        "proj_out_1": "modulation",
        "proj_out_2": "output",
    },
    "pixart": {
        "pos_embed.proj": "input",
        "caption_projection.linear_1": "input",
        "adaln_single.emb.timestep_embedder.linear_2": "time_embedding",
        "adaln_single.linear": "modulation",
        "transformer_blocks.0.attn2.to_q": "attention.qkv",
        "transformer_blocks.0.attn2.to_k": "cross_attention.kv",
        "proj_out": "output",
    },
    "sd3": _JOINT | {"pos_embed.proj": "input"},
    "flux": _JOINT
    | {
        "x_embedder": "input",
        "time_text_embed.guidance_embedder.linear_1": "time_embedding",
        "single_transformer_blocks.0.norm.linear": "modulation",
        "single_transformer_blocks.0.proj_mlp": "mlp.in",
        "single_transformer_blocks.0.proj_out": "mlp.out",
        "single_transformer_blocks.0.attn.to_q": "attention.qkv",
    },
}


@pytest.mark.parametrize("name", TINY)
def test_roles_of_key_layers(name: str) -> None:
    roles = layer_roles(tiny_denoiser(name))
    assert {key: roles.get(key) for key in EXPECTED[name]} == EXPECTED[name]


@pytest.mark.parametrize("name", TINY)
def test_every_layer_has_a_known_role(name: str) -> None:
    denoiser = tiny_denoiser(name)
    roles = layer_roles(denoiser)
    layers = [key for key, module in denoiser.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    assert list(roles) == layers
    assert set(roles.values()) <= set(get_args(Role)) - {"other"}


SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DIT_XL: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "out_channels": 8, "sample_size": 32}
# class, its published configuration, parameters, and the roles counted by hand from the papers' block tables
FULL_SIZE = {
    "sd15": (
        "UNet2DConditionModel",
        SD15,
        859_520_964,
        {
            "input": 1,
            "output": 1,
            "time_embedding": 2,
            "time_projection": 22,
            "resnet": 44,
            "shortcut": 14,
            "downsample": 3,
            "upsample": 3,
            "attention.projection": 32,
            "attention.qkv": 64,
            "cross_attention.kv": 32,
            "attention.out": 32,
            "mlp.in": 16,
            "mlp.out": 16,
        },
    ),
    "sdxl": (
        "UNet2DConditionModel",
        SDXL,
        2_567_463_684,
        {
            "input": 1,
            "output": 1,
            "time_embedding": 2,
            "class_embedding": 2,
            "time_projection": 17,
            "resnet": 34,
            "shortcut": 11,
            "downsample": 2,
            "upsample": 2,
            "attention.projection": 22,
            "attention.qkv": 280,
            "cross_attention.kv": 140,
            "attention.out": 140,
            "mlp.in": 70,
            "mlp.out": 70,
        },
    ),
    "dit-xl-2-256": (
        "DiTTransformer2DModel",
        DIT_XL,
        749_826_464,
        {
            "input": 1,
            "output": 1,
            "time_embedding": 56,
            "modulation": 29,
            "attention.qkv": 84,
            "attention.out": 28,
            "mlp.in": 28,
            "mlp.out": 28,
        },
    ),
    "flux-dev": (
        "FluxTransformer2DModel",
        {"guidance_embeds": True},
        11_901_408_320,
        {
            "input": 2,
            "output": 1,
            "time_embedding": 4,
            "class_embedding": 2,
            "modulation": 77,
            "attention.qkv": 228,
            "attention.out": 38,
            "mlp.in": 76,
            "mlp.out": 76,
        },
    ),
}


@pytest.fixture
def plain_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty without poison, which would write the 48 GB of FLUX before they are dropped."""
    monkeypatch.setattr(torch, "empty", getattr(torch.empty, "__wrapped__", torch.empty))


@pytest.mark.usefixtures("plain_empty")
@pytest.mark.parametrize("model", FULL_SIZE)
def test_counts_of_full_size_models_on_the_meta_device(model: str) -> None:
    class_name, config, parameters, counts = FULL_SIZE[model]
    with init_empty_weights():
        denoiser = getattr(diffusers, class_name)(**config)
    assert denoiser.device.type == "meta"
    assert Counter(layer_roles(denoiser).values()) == counts
    assert sum(parameter.numel() for parameter in denoiser.parameters()) == parameters


def test_a_layer_of_no_known_kind_is_other() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.something = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    assert layer_roles(Odd()) == {"something.0": "other"}
