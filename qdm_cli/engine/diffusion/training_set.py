"""Images as a denoiser is trained on them: latents in its own form, and the other arguments of its call, taken from the pipeline itself."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.images import Frame, Picture
from qdm_cli.engine.diffusion.sampling import call_arguments, native_size
from qdm_cli.engine.diffusion.trajectories import Arguments, sample_tensor
from qdm_cli.engine.diffusion.trajectories import call_arguments as arguments_of
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.denoiser import find_denoiser

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec

SAMPLE_NAMES = ("sample", "hidden_states")


@dataclass(frozen=True)
class TrainingSet:
    """Everything that a training step needs besides noise.

    Attributes:
        x0: f32 [N, ...] images or latents (their mean, where the encoder is random), as the denoiser takes them (FLUX: packed tokens).
        spread: f32 like x0, standard deviation of the encoder; None = it has none.
        conditions: distinct sets of further arguments of the denoiser, batch 1.
        which: condition of each image.
        sample_name: the denoiser's argument for x_t.
    """

    x0: Tensor
    spread: Tensor | None
    conditions: list[Arguments]
    which: list[int]
    sample_name: str

    def __len__(self) -> int:
        return len(self.x0)

    def draw(self, picks: Tensor, rng: torch.Generator) -> tuple[Tensor, Arguments]:
        """(x0 [B, ...], arguments of the denoiser other than x_t and timestep) of some images."""
        x0 = self.x0[picks]
        if self.spread is not None:
            x0 = x0 + self.spread[picks] * torch.randn(x0.shape, generator=rng)
        return x0, joined([self.conditions[self.which[int(i)]] for i in picks])


def joined(conditions: Sequence[Arguments]) -> Arguments:
    """Arguments of batch 1 as one batch; tensors without a batch (token positions) are shared."""
    if not conditions:
        return {}

    def join(values: list[Any]) -> Any:
        if isinstance(values[0], dict):
            return {name: join([value[name] for value in values]) for name in values[0]}
        if isinstance(values[0], Tensor) and values[0].ndim and values[0].shape[0] == 1:
            return torch.cat(values)
        return values[0]

    return join(list(conditions))


class _Enough(Exception):
    """Raised inside a pipeline call: its first denoiser call is all that was wanted."""


@torch.no_grad()
def first_call(pipeline: Any, sampler: SamplerSpec, *, prompt: str | None, class_label: int = 0) -> Arguments:
    """Arguments of the first denoiser call for one image without guidance; the denoiser does not run.

    Raises:
        InputError: as `sampling.call_arguments`.
    """
    known = inspect.signature(pipeline.__call__).parameters
    unguided = sampler.model_copy(update={"guidance": 1.0 if "guidance_scale" in known else None})
    own = {
        "batch_size": 1,
        "class_labels": [class_label],
        "prompt": prompt or "",
        "generator": torch.Generator().manual_seed(0),
    }
    denoiser = find_denoiser(pipeline)[1]
    found: list[Arguments] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(arguments_of(module, args, kwargs))
        raise _Enough

    handle = denoiser.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
    try:
        pipeline(**call_arguments(pipeline, unguided, "latent"), **{key: value for key, value in own.items() if key in known})
    except _Enough:
        pass
    finally:
        handle.remove()
    return found[0]


def frame_of(pipeline: Any, sampler: SamplerSpec) -> Frame:
    """Size and channels of the images that the pipeline makes."""
    vae = _encoder(pipeline)
    channels = int((vae or find_denoiser(pipeline)[1]).config.in_channels)
    size = sampler.size or native_size(pipeline)
    if size is None:
        side = int(pipeline.default_sample_size * pipeline.vae_scale_factor)
        size = (side, side)
    return Frame(int(size[0]), int(size[1]), channels)


def make_training_set(
    pipeline: Any,
    sampler: SamplerSpec,
    pictures: Sequence[Picture],
    *,
    instance_prompt: str | None,
    class_label: int = 0,
    flip: bool = False,
) -> TrainingSet:
    """Encode all images and prompts, once; afterwards training needs neither the autoencoder nor the text encoders.

    Raises:
        InputError: a prompt for a model that takes none, or a class that it lacks.
    """
    takes_text = "prompt" in inspect.signature(pipeline.__call__).parameters
    prompts = [picture.prompt or instance_prompt for picture in pictures]
    if not takes_text and instance_prompt:
        raise InputError(f"finetune.data.instance_prompt: {type(pipeline).__name__} takes no text", path="finetune.data.instance_prompt")
    texts = sorted({prompt or "" for prompt in prompts}) if takes_text else [""]
    calls = [first_call(pipeline, sampler, prompt=text, class_label=class_label) for text in texts]
    name = next(key for key in SAMPLE_NAMES if key in calls[0])
    conditions = [{key: value for key, value in call.items() if key not in (name, "timestep")} for call in calls]
    pixels = torch.stack([picture.pixels for picture in pictures])
    which = [texts.index(prompt or "") if takes_text else 0 for prompt in prompts]
    if flip:
        pixels, which = torch.cat([pixels, pixels.flip(-1)]), which * 2
    x0, spread = encode(pipeline, pixels)
    if sample_tensor(calls[0]).ndim == 3 and x0.ndim == 4:
        x0, spread = (None if part is None else pipeline._pack_latents(part, *part.shape) for part in (x0, spread))
    assert x0 is not None
    return TrainingSet(x0, spread, conditions, which, name)


def _encoder(pipeline: Any) -> Any:
    return getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)


@torch.no_grad()
def encode(pipeline: Any, pixels: Tensor, batch: int = 4) -> tuple[Tensor, Tensor | None]:
    """Scaled latents (mean, standard deviation or None) of images [N, C, H, W] in [-1, 1]; the images themselves without an autoencoder."""
    vae = _encoder(pipeline)
    if vae is None:
        return pixels, None
    scale, shift = float(vae.config.scaling_factor), float(getattr(vae.config, "shift_factor", None) or 0.0)
    means, spreads = [], []
    for part in pixels.split(batch):
        encoded = vae.encode(part.to(device=vae.device, dtype=vae.dtype))
        distribution = getattr(encoded, "latent_dist", None)
        mean = encoded.latents if distribution is None else distribution.mean
        means.append((mean.float().cpu() - shift) * scale)
        if distribution is not None:
            spreads.append(distribution.std.float().cpu() * scale)
    return torch.cat(means), torch.cat(spreads) if spreads else None
