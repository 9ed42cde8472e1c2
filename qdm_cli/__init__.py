"""qdm makes diffusion models smaller and faster. Importing it is cheap and lets stock diffusers open folders written by `qdm export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from qdm_cli.engine.runtime.registration import register, registration_status

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"
__all__ = ["__version__", "cached", "load", "register", "registration_status"]


def load(
    folder: str | Path,
    *,
    mode: str | None = None,
    scales: str | Path | None = None,
    cache: bool | str | Path = True,
    device: str | None = None,
    graphs: bool | None = None,
    **kwargs: Any,
) -> Any:
    """Open a folder written by `qdm export` as a diffusers pipeline, which follows the cache schedule of the folder if it has one.

    Args:
        folder: the exported artifact.
        mode: auto = the fastest arithmetic of this machine in every layer; exact = quantized arithmetic everywhere, which gives the same
            result on every machine; None = the environment variable QDM_MODE, else auto.
        scales: a personalisation made by `qdm finetune` (method peqa or tuneqdm) on the same integer model: its scale file, or the folder
            that holds it; None = the scales that the folder was exported with.
        cache: True = by the folder's schedule; False = every call in full; or another schedule's file or folder. What was switched on is
            `qdm_cli.cached(pipeline)`.
        device: such as `cuda`: where the whole pipeline goes; None = where diffusers puts it.
        graphs: replay the denoiser from CUDA graphs, one per shape of its inputs, kept up to four at a time: without torch.compile,
            several times faster than eager calls. Along a cache schedule, one more for each half of a cut. None = where the denoiser is
            on a CUDA device once it is loaded, and nothing such as CPU offload stands against it; False = never; True = or an error.
        kwargs: handed to `DiffusionPipeline.from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        qdm_cli.engine.errors.InputError: no such folder, not an export, its files are corrupt, or scales or schedule belong to another
            model.
    """
    from qdm_cli.engine.runtime.loading import open_pipeline

    return open_pipeline(folder, mode=mode, scales=scales, cache=cache, device=device, graphs=graphs, **kwargs)


def cached(
    pipeline: Any,
    schedule: Any = None,
    *,
    interval: int | None = None,
    cut: int | tuple[int, int | None] | None = None,
    resample: bool = True,
    force: bool = False,
    controlnet: Literal["recompute", "reuse"] = "recompute",
    compile: bool | dict[str, Any] = False,
) -> Any:
    """Feature caching for any diffusers pipeline with a U-Net, DiT, PixArt, SD3 or FLUX denoiser.

    `with qdm_cli.cached(pipeline, "schedule.json"): ...` caches inside the block; `qdm_cli.cached(pipeline, ...).enable()` until
    `.disable()`. `.summary()` counts what happened. Whatever does not fit at run time is computed in full.

    Args:
        pipeline: a diffusers pipeline; it is not changed outside the block.
        schedule: `schedule.json` of `qdm cache`, its folder, or a Schedule; None with no `interval` = the cache that is switched on.
        interval: instead of a schedule, DeepCache's uniform rule: every interval-th step in full.
        cut: of `interval`: skip branch m of a U-Net counted from 1, or (first, end) block of a transformer; None = the cheapest.
        resample: move a schedule to the steps that the pipeline is called with, with a warning; False = refuse other steps.
        force: cache also in 8 or fewer steps.
        controlnet: reuse = a ControlNet is computed only where the denoiser is, and its residuals are reused as well.
        compile: True or options of `torch.compile`: compile full and partial forward, one graph each.

    Raises:
        qdm_cli.engine.errors.InputError: a broken schedule or one of another model, a cut that the model lacks, or a denoiser that runs
            along another schedule already.
    """
    from qdm_cli.engine.caching.runtime import cached as make

    options: dict[str, Any] = {"resample": resample, "force": force, "controlnet": controlnet, "compile": compile}
    return make(pipeline, schedule, interval=interval, cut=cut, **options)


register()
