"""What a pipeline's sampling loop does, seen from the denoiser: timesteps, noise levels, steps of its calls."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch

from qdm_cli.engine.caching.schedule import LOG_SNR_LIMIT, Guidance, SamplerRef, hash_config
from qdm_cli.engine.diffusion.sampling import answered_once, batches
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.denoiser import find_denoiser

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec


def trace_sampler(model: Any, sampler: SamplerSpec) -> tuple[SamplerRef, Guidance]:
    """The sampling loop that a schedule is made for. Costs one denoiser call per input shape.

    Args:
        model: a LoadedPipeline or a diffusers pipeline whose scheduler is already the sampler's.

    Raises:
        InputError: a loop that calls the denoiser an unequal number of times per scheduler step.
    """
    pipeline = getattr(model, "pipeline", model)
    timesteps, width, passes = _observe(pipeline, sampler)
    mode = "sequential" if passes > 1 else "batched" if width > 1 else "none"
    guidance = Guidance(mode=mode, scale=sampler.guidance)  # type: ignore[arg-type]
    return sampler_at(pipeline.scheduler, timesteps[::passes], sampler.steps), guidance


def sampler_at(scheduler: Any, timesteps: Sequence[float], steps: int) -> SamplerRef:
    """A scheduler on a grid of timesteps, one per denoiser call, as the denoiser or the scheduler has them."""
    return SamplerRef(
        class_=type(scheduler).__name__,
        config_sha256=hash_config(scheduler.config),
        steps=steps,
        calls=len(timesteps),
        timesteps=tuple(map(float, timesteps)),
        log_snr=tuple(log_snr(scheduler, float(t)) for t in timesteps),
        step_of_call=steps_of_calls(scheduler, timesteps, steps),
    )


def _observe(pipeline: Any, sampler: SamplerSpec) -> tuple[list[float], int, int]:
    """(timestep of each denoiser call, samples of a call for one image, calls per scheduler step)."""
    calls: list[float] = []
    widths: list[int] = []
    per_step: list[int] = []
    denoiser = find_denoiser(pipeline)[1]
    scheduler, step = pipeline.scheduler, pipeline.scheduler.step

    @wraps(step)  # whoever wraps it again reads its signature
    def counted(*args: Any, **kwargs: Any) -> Any:
        per_step.append(len(calls) - sum(per_step))
        return step(*args, **kwargs)

    def seen(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor) and value.ndim > 1)
        widths.append(int(value.shape[0]))

    scheduler.step = counted
    handle = denoiser.register_forward_pre_hook(seen, with_kwargs=True)
    try:
        with answered_once(denoiser, lambda t: calls.append(float(t))):
            for _ in batches(pipeline, sampler, count=1, batch=1, output="latent"):
                pass
    finally:
        handle.remove()
        vars(scheduler).pop("step", None)
    if len(set(per_step)) != 1 or per_step[0] < 1:
        raise InputError(
            f"{type(pipeline).__name__} calls the denoiser {sorted(set(per_step))} times per step; a schedule needs one number"
        )
    return calls, max(widths), per_step[0]


def log_snr(scheduler: Any, timestep: float) -> float:
    """log(alpha^2 / sigma^2) at a timestep as the denoiser sees it, within +-30.

    Noise schedules by `alphas_cumprod` are interpolated between whole timesteps; flow matching has alpha = 1 - sigma, sigma = t / T.
    """
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is not None:
        place = min(max(timestep, 0.0), len(table) - 1.0)
        low = int(place)
        logits = [torch.logit(table[i].double(), eps=1e-13).item() for i in (low, min(low + 1, len(table) - 1))]
        value = logits[0] + (logits[1] - logits[0]) * (place - low)
    else:
        total = float(scheduler.config.get("num_train_timesteps", 1000))
        sigma = min(max(timestep if timestep <= 1 else timestep / total, 1e-7), 1 - 1e-7)
        value = 2 * math.log((1 - sigma) / sigma)
    return min(max(value, -LOG_SNR_LIMIT), LOG_SNR_LIMIT)


def steps_of_calls(scheduler: Any, timesteps: Sequence[float], steps: int) -> tuple[int, ...]:
    """Denoising step of each call.

    Second-order solvers (Heun, KDPM2) call twice in every step but the last, PNDM four times in each of its first three steps, PLMS
    twice in its first. Where none of this explains the number of calls, every call is a step.
    """
    calls = len(timesteps)
    if calls == steps:
        return tuple(range(calls))
    order = int(getattr(scheduler, "order", 1))
    if order > 1 and calls == order * (steps - 1) + 1:
        return tuple(call // order for call in range(calls))
    if type(scheduler).__name__ == "PNDMScheduler" and calls == steps + 1:
        return (0, *range(steps))
    if type(scheduler).__name__ == "PNDMScheduler" and calls == steps + 9:
        return tuple(call // 4 if call < 12 else call - 9 for call in range(calls))
    return tuple(range(calls))
