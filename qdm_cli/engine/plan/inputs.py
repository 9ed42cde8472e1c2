"""Arguments of a denoiser call of the right shapes, from its signature and configuration alone."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.models.folder import read_json
from qdm_cli.engine.models.source import resolve_source

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import Recipe

CLIP_TOKENS, T5_TOKENS, SD3_TOKENS, FLUX_TOKENS = 77, 120, 333, 512
FLUX_SIZE = 128
# pipelines whose denoiser sees every image once: no guidance, or guidance as an input
ONE_PASS = ("DDPM", "DDIM", "PNDM", "Karras", "ScoreSde", "LDM", "Flux", "LatentConsistency", "Consistency")


@dataclass(frozen=True)
class CallShape:
    """Shape of the denoiser calls of one stage.

    Attributes:
        images: images in work at a time. `samples`: batch of the denoiser call; twice as many under guidance.
        size: height and width of what the denoiser sees, before patching.
    """

    images: int
    samples: int
    size: tuple[int, int]


def call_shape(
    recipe: Recipe, denoiser: nn.Module, pipeline_class: str, images: int, *, guided: bool = True, smoke: bool = False
) -> CallShape:
    """Shape of a call for `images` images; `guided`: with both halves of guidance where the pipeline has it."""
    passes = 1 if not guided or pipeline_class.startswith(ONE_PASS) or (recipe.sampler.guidance or 7.5) <= 1 else 2
    return CallShape(images, images * passes, _latent_size(recipe, denoiser, smoke=smoke))


def _latent_size(recipe: Recipe, denoiser: nn.Module, *, smoke: bool) -> tuple[int, int]:
    config = getattr(denoiser, "config", {})
    native = config.get("sample_size") or (FLUX_SIZE if config.get("axes_dims_rope") else 32)
    native = (native, native) if isinstance(native, int) else (native[0], native[1])
    size = recipe.sampler.size
    if size is None:
        return native
    factor = _vae_factor(recipe, smoke=smoke)
    return (size[0] // factor, size[1] // factor)


def _vae_factor(recipe: Recipe, *, smoke: bool) -> int:
    """Pixels per latent, from the autoencoder's configuration; 8 = what most have, where it cannot be read; 1 without one."""
    source = resolve_source(recipe.model, smoke=smoke, offline=True)
    if source.kind == "tiny":
        # the tiny autoencoders have two levels, but PixArt's: its pipeline knows no image below 256 pixels
        return 8 if source.name == "pixart" else 2
    if source.path is None or not source.path.is_dir():
        return 8
    files = [source.path / part / "config.json" for part in ("vae", "vqvae")]
    found = next((read_json(path) for path in files if path.is_file()), None)
    return 1 if found is None else 2 ** (len(found.get("block_out_channels", [0, 0, 0, 0])) - 1)


def example_inputs(denoiser: nn.Module, shape: CallShape, device: str = "meta", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Keyword arguments of one call, float32 noise or integers of a legal range.

    Raises:
        ValueError: the denoiser has a required argument that is not known here.
    """
    config = getattr(denoiser, "config", {})
    makers = _makers(config, shape, device, dtype)
    known = inspect.signature(denoiser.forward).parameters
    found = {name: make() for name, make in makers.items() if name in known}
    found = {name: value for name, value in found.items() if value is not None}
    for name, parameter in known.items():
        if (
            parameter.default is parameter.empty
            and name not in found
            and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ):
            raise ValueError(f"{type(denoiser).__name__}.forward needs {name}")
    return found


def _makers(config: Any, shape: CallShape, device: str, dtype: torch.dtype) -> dict[str, Any]:
    batch, (height, width) = shape.samples, shape.size
    channels = config.get("in_channels", 3)

    def noise(*sides: int) -> torch.Tensor:
        return torch.randn(*sides, device=device, dtype=dtype)

    def optional(*sides: int | None) -> torch.Tensor | None:
        return None if any(side is None for side in sides) else noise(*(side for side in sides if side is not None))

    packed = config.get("axes_dims_rope") is not None  # FLUX: patches are packed into tokens outside of the model
    tokens = (height // 2) * (width // 2)
    text = config.get("caption_channels") or config.get("cross_attention_dim") or config.get("joint_attention_dim")
    text = text[0] if isinstance(text, list | tuple) else text
    length = (
        FLUX_TOKENS
        if packed
        else T5_TOKENS
        if config.get("caption_channels")
        else SD3_TOKENS
        if config.get("joint_attention_dim")
        else CLIP_TOKENS
    )
    labels = config.get("num_embeds_ada_norm") and not config.get("caption_channels")
    return {
        "sample": lambda: noise(batch, channels, height, width),
        "hidden_states": lambda: noise(batch, tokens, channels) if packed else noise(batch, channels, height, width),
        "timestep": lambda: torch.full((batch,), 0.5 if packed else 1, device=device),
        "encoder_hidden_states": lambda: optional(batch, length, text),
        "pooled_projections": lambda: optional(batch, config.get("pooled_projection_dim")),
        "class_labels": lambda: torch.zeros(batch, dtype=torch.long, device=device) if labels or config.get("class_embed_type") else None,
        "added_cond_kwargs": lambda: _added(config, batch, noise, device),
        "img_ids": lambda: torch.zeros(tokens, 3, device=device),
        "txt_ids": lambda: torch.zeros(length, 3, device=device),
        "guidance": lambda: torch.ones(batch, device=device) if config.get("guidance_embeds") else None,
    }


def _added(config: Any, batch: int, noise: Any, device: str) -> dict[str, Any] | None:
    """SDXL's pooled text and sizes; PixArt's empty resolution."""
    if config.get("addition_embed_type") == "text_time":
        sizes = 6
        pooled = config["projection_class_embeddings_input_dim"] - sizes * config["addition_time_embed_dim"]
        return {"text_embeds": noise(batch, pooled), "time_ids": torch.zeros(batch, sizes, device=device)}
    return {"resolution": None, "aspect_ratio": None} if config.get("caption_channels") else None
