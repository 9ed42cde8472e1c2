"""Replacing a pipeline's scheduler by class name, with the combinations that cannot work refused."""

from __future__ import annotations

import difflib
import inspect
from typing import Any

import diffusers

from qdm_cli.engine.errors import InputError

# unconditional pixel pipelines fix their scheduler in code: DDIM's call has eta, DDPM's call has none
_PIXEL = {"DDIMPipeline", "DDPMPipeline"}
_UNSCALED = _PIXEL | {"DiTPipeline"}


def scheduler_class(name: str) -> Any:
    """A diffusers scheduler class by name.

    Raises:
        InputError: there is none of this name.
    """
    known = [item for item in dir(diffusers) if item.endswith("Scheduler") and not item.startswith(("Flax", "_"))]
    if name not in known:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        guess = f" Did you mean '{near[0]}'?" if near else ""
        raise InputError(
            f"sampler.scheduler: diffusers has no scheduler {name!r}.{guess}", path="sampler.scheduler", hint=near[0] if near else None
        )
    return getattr(diffusers, name)


def pipeline_class_for(class_name: str, scheduler: str | None) -> str:
    """Pipeline class that runs with this scheduler: `DDPMPipeline` and `DDIMPipeline` are the same model with two samplers."""
    if scheduler is None or class_name not in _PIXEL:
        return class_name
    return "DDIMPipeline" if scheduler == "DDIMScheduler" else "DDPMPipeline"


def with_scheduler(pipeline: Any, name: str | None) -> Any:
    """The pipeline with scheduler `name`, configured from its own; None = unchanged. Components are shared, not copied.

    Raises:
        InputError: unknown scheduler, or one that this kind of model cannot be sampled with.
    """
    if name is None:
        return pipeline
    wanted = scheduler_class(name)
    scheduler = wanted.from_config(pipeline.scheduler.config, **_flow_options(pipeline, wanted))
    current = type(pipeline).__name__
    if current in _UNSCALED and float(scheduler.init_noise_sigma) != 1.0:
        raise _misfit(pipeline, wanted, "it starts from scaled noise, which this pipeline does not make; DDIMScheduler fits")
    if current in _PIXEL:
        if "generator" not in inspect.signature(scheduler.step).parameters:
            raise _misfit(pipeline, wanted, "it takes no noise generator; DDIMScheduler and DDPMScheduler do")
        return getattr(diffusers, pipeline_class_for(current, name))(unet=pipeline.unet, scheduler=scheduler)
    pipeline.scheduler = scheduler
    return pipeline


def _flow_options(pipeline: Any, wanted: Any) -> dict[str, Any]:
    """Options that make `wanted` a flow-matching sampler where the model predicts velocities of a flow."""
    is_flow = type(pipeline.scheduler).__name__.startswith("FlowMatch")
    if pipeline.scheduler.config.get("use_dynamic_shifting") and "mu" not in inspect.signature(wanted.set_timesteps).parameters:
        raise _misfit(pipeline, wanted, "it cannot shift its timesteps by the image size; use FlowMatchEulerDiscreteScheduler")
    if wanted.__name__.startswith("FlowMatch"):
        if not is_flow:
            raise _misfit(pipeline, wanted, "it samples flow-matching models, and this model predicts noise")
        return {}
    if not is_flow:
        return {}
    if "use_flow_sigmas" not in inspect.signature(wanted.__init__).parameters:
        raise _misfit(pipeline, wanted, "this model predicts a flow; use FlowMatchEulerDiscreteScheduler")
    return {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": pipeline.scheduler.config.get("shift", 1.0)}


def _misfit(pipeline: Any, wanted: Any, why: str) -> InputError:
    text = f"sampler.scheduler: {wanted.__name__} does not fit {type(pipeline).__name__}: {why}."
    return InputError(text, path="sampler.scheduler")
