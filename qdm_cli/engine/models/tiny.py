"""`tiny:NAME`: complete stock pipelines with seeded random weights, built in code, for tests and `--smoke`."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.tiny_text import WIDTH, clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

TINY_VERSION = 1
_SEED = 20240607


def build_tiny(name: str) -> Any:
    """Pipeline `tiny:NAME`, float32, the same weights in every process.

    Raises:
        InputError: no such name.
    """
    return _seeded(lambda: _entry(name)[1](_denoiser(name)))


def tiny_denoiser(name: str) -> nn.Module:
    """Only the denoiser of `tiny:NAME`, with the weights it has in the pipeline."""
    return _seeded(lambda: _denoiser(name))


def tiny_class(name: str) -> str:
    """Name of the pipeline class of `tiny:NAME`."""
    return _entry(name)[2]


def _entry(name: str) -> tuple[Callable[[], nn.Module], Callable[[Any], Any], str]:
    if name not in TINY:
        near = difflib.get_close_matches(name, TINY, 1)
        guess = f" Did you mean 'tiny:{near[0]}'?" if near else ""
        raise InputError(f"model.id: no tiny model is called {name!r}.{guess} ({', '.join(TINY)})", path="model.id")
    return TINY[name]


def _seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return build()


def _denoiser(name: str) -> nn.Module:
    """First thing built after seeding, so that alone and in its pipeline it gets equal weights."""
    module = _entry(name)[0]()
    for parameter in module.parameters():
        # a zero-initialised layer would hide everything before it from every comparison
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    return module


def _ddim() -> Any:
    return diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=True)


def _latent_scheduler() -> Any:
    return diffusers.DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def _vae(*, latent: int = 4, levels: int = 2, **config: Any) -> Any:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(16,) * levels,
        layers_per_block=1,
        latent_channels=latent,
        norm_num_groups=8,
        sample_size=16,
        **config,
    )


def _pixel_unet(channels: int, size: int) -> nn.Module:
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
    )


def _sd_unet(**config: Any) -> nn.Module:
    return diffusers.UNet2DConditionModel(
        **{
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": WIDTH,
            "attention_head_dim": 2,
            "norm_num_groups": 8,
            **config,
        }
    )


def _sdxl_unet() -> nn.Module:
    return _sd_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(2, 4),
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )


def _dit() -> nn.Module:
    # 1000 classes, because DiTPipeline hard-codes 1000 as the label of "no class"
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000
    )


def _pixart() -> nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=64,
        sample_size=32,
        caption_channels=WIDTH,
        use_additional_conditions=False,
    )


def _sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=2 * WIDTH,
        caption_projection_dim=64,
        pooled_projection_dim=2 * WIDTH,
        pos_embed_max_size=16,
    )


def _flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        num_attention_heads=2,
        attention_head_dim=32,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )


def _ddpm_pipeline(unet: Any) -> Any:
    return diffusers.DDIMPipeline(unet=unet, scheduler=_ddim())


def _ldm_pipeline(unet: Any) -> Any:
    vqvae = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 16),
        latent_channels=3,
        num_vq_embeddings=64,
        norm_num_groups=8,
        sample_size=16,
    )
    return diffusers.LDMPipeline(vqvae=vqvae, unet=unet, scheduler=_latent_scheduler())


def _sd_pipeline(unet: Any) -> Any:
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionPipeline(
        vae=_vae(),
        text_encoder=clip_encoder(tokenizer, projection=False),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_latent_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl_pipeline(unet: Any) -> Any:
    tokenizer = clip_tokenizer()
    return diffusers.StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=clip_encoder(tokenizer, projection=False),
        text_encoder_2=clip_encoder(tokenizer, projection=True),
        tokenizer=tokenizer,
        tokenizer_2=clip_tokenizer(),
        unet=unet,
        scheduler=_latent_scheduler(),
        add_watermarker=False,
    )


def _dit_pipeline(transformer: Any) -> Any:
    labels = {index: f"class {index}" for index in range(1000)}
    return diffusers.DiTPipeline(transformer=transformer, vae=_vae(), scheduler=_ddim_dit(), id2label=labels)


def _ddim_dit() -> Any:
    return diffusers.DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def _pixart_pipeline(transformer: Any) -> Any:
    tokenizer = t5_tokenizer()
    # factor 8 and 32 latents, because PixArt's own resolution binning knows no size below 256
    return diffusers.PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=t5_encoder(tokenizer), vae=_vae(levels=4), transformer=transformer, scheduler=_ddim_dit()
    )


def _sd3_pipeline(transformer: Any) -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(latent=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5),
        text_encoder=clip_encoder(clip, projection=True),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip, projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_encoder(t5, width=2 * WIDTH),
        tokenizer_3=t5,
    )


def _flux_pipeline(transformer: Any) -> Any:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=_vae(latent=16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.12, scaling_factor=0.36),
        text_encoder=clip_encoder(clip, projection=False),
        tokenizer=clip,
        text_encoder_2=t5_encoder(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )


# name -> (denoiser, its pipeline, pipeline class). `fashion` has the image shape of builtin:fashion-unet32.
TINY: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], str]] = {
    "ddpm": (lambda: _pixel_unet(3, 16), _ddpm_pipeline, "DDIMPipeline"),
    "fashion": (lambda: _pixel_unet(1, 32), _ddpm_pipeline, "DDIMPipeline"),
    "ldm": (lambda: _pixel_unet(3, 8), _ldm_pipeline, "LDMPipeline"),
    "sd": (_sd_unet, _sd_pipeline, "StableDiffusionPipeline"),
    "sdxl": (_sdxl_unet, _sdxl_pipeline, "StableDiffusionXLPipeline"),
    "dit": (_dit, _dit_pipeline, "DiTPipeline"),
    "pixart": (_pixart, _pixart_pipeline, "PixArtAlphaPipeline"),
    "sd3": (_sd3, _sd3_pipeline, "StableDiffusion3Pipeline"),
    "flux": (_flux, _flux_pipeline, "FluxPipeline"),
}
