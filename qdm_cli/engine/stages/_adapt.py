"""What `finetune` hands to methods that adapt a quantized model to images: encoded images, noise schedule, prior samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.diffusion.images import read_images
from qdm_cli.engine.diffusion.noising import training_schedule
from qdm_cli.engine.diffusion.sampling import generate, step_timesteps
from qdm_cli.engine.diffusion.training_set import TrainingSet, first_call, frame_of, make_training_set
from qdm_cli.engine.quant.scale_adapt import AdaptInputs

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.models import LoadedPipeline
    from qdm_cli.engine.quant.scale_config import AdaptConfig

PRIOR_START = 3_000_000
"""Index of the first prior sample: its noise is that of no evaluated image."""


def adapt_inputs(loaded: LoadedPipeline, spec: AdaptConfig, ctx: RunContext) -> AdaptInputs:
    """Read and encode the images; ask the pipeline for its timesteps.

    Raises:
        InputError: as `read_images`, `make_training_set` and `training_schedule`.
    """
    pipeline, sampler, data = loaded.pipeline, ctx.recipe.sampler, spec.data
    pictures = read_images(data.images, frame_of(pipeline, sampler), limit=data.limit, skip_bad=data.skip_bad, warn=ctx.warn)
    ctx.events.log(f"finetune: {len(pictures)} images from {data.images}")
    visited = step_timesteps(loaded, sampler)
    schedule = training_schedule(pipeline.scheduler, unit_time=max(visited) <= 1)
    training = make_training_set(
        pipeline, sampler, pictures, instance_prompt=data.instance_prompt, class_label=data.class_label, flip=data.flip
    )
    return AdaptInputs(training, schedule, visited, prior_maker(loaded, spec, training, ctx))


def prior_maker(loaded: LoadedPipeline, spec: AdaptConfig, like: TrainingSet, ctx: RunContext) -> Callable[[], TrainingSet] | None:
    """Samples of the pipeline as it is when called, kept for a resumed run; None = the recipe wants none."""
    prior = spec.prior
    if prior is None:
        return None
    path = ctx.resume / "prior.safetensors"

    def make() -> TrainingSet:
        if not path.exists():
            prompts: Any = [prior.prompt] if prior.prompt else None
            size = spec.batch_size
            images = generate(
                loaded, ctx.recipe.sampler, count=prior.images, prompts=prompts, seed=ctx.recipe.seed, batch=size, start=PRIOR_START,
                output="latent",
            )  # fmt: skip
            write_tensors(path, {"x0": images})
        x0 = read_tensors(path)[0]["x0"]
        call = first_call(loaded.pipeline, ctx.recipe.sampler, prompt=prior.prompt, class_label=spec.data.class_label)
        condition = {key: value for key, value in call.items() if key not in (like.sample_name, "timestep")}
        return replace(like, x0=x0, spread=None, conditions=[condition], which=[0] * len(x0))

    return make
