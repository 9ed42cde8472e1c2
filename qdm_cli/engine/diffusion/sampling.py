"""Images and latents from any diffusers pipeline, one noise generator per sample (interface spec 9)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from qdm_cli.engine.diffusion.prompts import CAPTIONS, prompts_for
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.denoiser import find_denoiser

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec

Output = Literal["image", "latent"]


def generate(
    model: Any,
    sampler: SamplerSpec,
    *,
    count: int | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch: int = 8,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
    output: Output = "image",
) -> torch.Tensor:
    """All samples at once, [N, C, H, W] float32 on the CPU; arguments as `batches`."""
    parts = batches(model, sampler, count=count, prompts=prompts, seed=seed, batch=batch, start=start, progress=progress, output=output)
    return torch.cat(list(parts))


def batches(
    model: Any,
    sampler: SamplerSpec,
    *,
    count: int | None = None,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    batch: int = 8,
    start: int = 0,
    progress: Callable[[int, int], None] | None = None,
    output: Output = "image",
) -> Iterator[torch.Tensor]:
    """Samples start .. start + count - 1, batch by batch, so that memory holds one batch.

    All noise of sample i comes from a CPU generator with seed + i; its prompt is prompts[i mod len], its class i mod classes. So a
    sample depends neither on the batch size nor on the other samples, up to the rounding of differently shaped matrix products.

    Args:
        model: a LoadedPipeline or a diffusers pipeline whose scheduler is already the sampler's.
        count: number of samples; None = one per prompt.
        prompts: of text pipelines; None = the 128 captions that ship with qdm. Ignored where the pipeline takes none.
        progress: called with (samples done, count).
        output: image = [B, C, H, W] in [0, 1]; latent = what the last step gave, as the pipeline holds it (FLUX: packed tokens).

    Raises:
        InputError: the sampler sets guidance or a size that the pipeline does not have, or the pipeline needs other inputs.
    """
    pipeline = getattr(model, "pipeline", model)
    fixed = call_arguments(pipeline, sampler, output)
    if count is None:
        if prompts is None:
            raise ValueError("count or prompts is needed")
        count = len(prompts)
    texts = list(prompts) if prompts is not None else prompts_for(CAPTIONS)
    for first in range(start, start + count, batch):
        indices = range(first, min(first + batch, start + count))
        yield _sample(pipeline, sampler, fixed, indices, texts, seed, output)
        if progress:
            progress(indices[-1] + 1 - start, count)


def call_arguments(pipeline: Any, sampler: SamplerSpec, output: Output = "image") -> dict[str, Any]:
    """Arguments of `pipeline(...)` that do not depend on the sample.

    Raises:
        InputError: as `batches`.
    """
    known = inspect.signature(pipeline.__call__).parameters
    name = type(pipeline).__name__
    wanted = {
        "num_inference_steps": sampler.steps,
        "eta": sampler.eta,
        # latents of pipelines without this output type are taken from the last step all the same
        "output_type": "latent" if output == "latent" and "prompt" in known else "pt",
        "clean_caption": False,  # True depends on what else is installed
        "use_resolution_binning": False,  # it would change the size that the recipe asks for
    }
    if sampler.guidance is not None:
        if "guidance_scale" not in known:
            raise InputError(f"sampler.guidance: {name} has no guidance. Remove the setting.", path="sampler.guidance")
        wanted["guidance_scale"] = sampler.guidance
    if sampler.size is not None and "height" in known:
        wanted |= {"height": sampler.size[0], "width": sampler.size[1]}
    elif sampler.size is not None and tuple(sampler.size) != native_size(pipeline):
        text = f"sampler.size: {name} makes images of {native_size(pipeline)} pixels only (got {tuple(sampler.size)})."
        raise InputError(text, path="sampler.size")
    given = {*wanted, "prompt", "batch_size", "class_labels", "generator"}
    missing = [key for key, value in known.items() if value.default is value.empty and value.kind != value.VAR_KEYWORD and key not in given]
    if missing:
        raise InputError(f"model.id: {name} needs {', '.join(missing)}; qdm samples from noise, classes or prompts.", path="model.id")
    return {key: value for key, value in wanted.items() if key in known}


def native_size(pipeline: Any) -> tuple[int, int] | None:
    """Height and width in pixels of a pipeline that has one size; None = unknown."""
    size = find_denoiser(pipeline)[1].config.get("sample_size")
    if size is None:
        return None
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 1
    height, width = (size, size) if isinstance(size, int) else size
    return height * factor, width * factor


def _sample(
    pipeline: Any, sampler: SamplerSpec, fixed: dict[str, Any], indices: range, texts: list[str], seed: int, output: Output
) -> torch.Tensor:
    known = inspect.signature(pipeline.__call__).parameters
    generators = [torch.Generator().manual_seed(seed + index) for index in indices]
    own = {
        "batch_size": len(indices),
        "class_labels": [index % class_count(pipeline) for index in indices],
        "prompt": [texts[index % len(texts)] for index in indices],
        "generator": generators,
    }
    # not inference_mode: schedulers keep tensors that training reads later
    with torch.no_grad(), _scheduler_steps(pipeline, generators, sampler.eta) as last:
        images = pipeline(**fixed, **{key: value for key, value in own.items() if key in known}).images
    if output == "latent":
        # two-pass guidance of DiT carries both halves
        return last.sample[: len(indices)].float().cpu()
    if not isinstance(images, torch.Tensor):
        images = torch.as_tensor(images).permute(0, 3, 1, 2)
    return images.float().cpu()


def class_count(pipeline: Any) -> int:
    """Classes of a class-conditional pipeline, without the one that means "no class"; 1 for others."""
    return int(find_denoiser(pipeline)[1].config.get("num_embeds_ada_norm") or 1)


@dataclass
class _Last:
    sample: torch.Tensor = field(default_factory=lambda: torch.empty(0))


@contextmanager
def _scheduler_steps(pipeline: Any, generators: list[torch.Generator], eta: float) -> Iterator[_Last]:
    """Give every scheduler step the samples' generators and eta, which some pipelines (DiT, LDM, DDPM) forget; keep the last sample."""
    step, replaced = pipeline.scheduler.step, vars(pipeline.scheduler).get("step")
    known = inspect.signature(step).parameters
    last = _Last()

    def own_step(model_output: torch.Tensor, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if "generator" in known and kwargs.get("generator") is None:
            kwargs["generator"] = generators * (len(sample) // len(generators))
        if "eta" in known and not args:
            kwargs.setdefault("eta", eta)
        result = step(model_output, timestep, sample, *args, **kwargs)
        last.sample = result[0] if isinstance(result, tuple) else result.prev_sample
        return result

    pipeline.scheduler.step = own_step
    try:
        yield last
    finally:
        del pipeline.scheduler.step
        if replaced is not None:
            pipeline.scheduler.step = replaced


def step_timesteps(model: Any, sampler: SamplerSpec) -> list[float]:
    """Distinct timesteps that the denoiser is called with, in order of the first call.

    They are what the pipeline really passes (FLUX: in [0, 1]; flow matching: shifted by image size). Costs one denoiser call per
    input shape: later calls get its output again, because timesteps do not depend on it.
    """
    pipeline = getattr(model, "pipeline", model)
    seen: dict[float, None] = {}
    with answered_once(find_denoiser(pipeline)[1], lambda timestep: seen.setdefault(float(timestep))):
        for _ in batches(pipeline, sampler, count=1, batch=1, output="latent"):
            pass
    return list(seen)


@contextmanager
def answered_once(denoiser: nn.Module, on_timestep: Callable[[torch.Tensor], Any]) -> Iterator[None]:
    """Replace `denoiser.forward` by one that reports the timestep and computes only the first call of each input shape."""
    forward, own = denoiser.forward, "forward" in vars(denoiser)
    answers: dict[Any, Any] = {}

    def first_only(*args: Any, **kwargs: Any) -> Any:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        on_timestep(torch.as_tensor(timestep).flatten()[0])
        shape = next(value.shape for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1)
        if shape not in answers:
            answers[shape] = forward(*args, **kwargs)
        return answers[shape]

    denoiser.forward = first_only
    try:
        yield
    finally:
        if own:
            denoiser.forward = forward
        else:
            del denoiser.forward
