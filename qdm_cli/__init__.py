"""qdm makes diffusion models smaller and faster. Importing it is cheap and lets stock diffusers open folders written by `qdm export`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from qdm_cli.engine.runtime.registration import register, registration_status

if TYPE_CHECKING:
    from pathlib import Path

__version__ = "0.1.0"
__all__ = ["__version__", "load", "register", "registration_status"]


def load(folder: str | Path, *, mode: str | None = None, scales: str | Path | None = None, **kwargs: Any) -> Any:
    """Open a folder written by `qdm export` as a diffusers pipeline.

    Args:
        folder: the exported artifact.
        mode: auto = the fastest arithmetic of this machine in every layer; exact = quantized arithmetic everywhere, which gives the same
            result on every machine; None = the environment variable QDM_MODE, else auto.
        scales: a personalisation made by `qdm finetune` (method peqa or tuneqdm) on the same integer model: its scale file, or the folder
            that holds it; None = the scales that the folder was exported with.
        kwargs: handed to `DiffusionPipeline.from_pretrained`, such as `dtype` or `device_map`.

    Raises:
        qdm_cli.engine.errors.InputError: no such folder, not an export, its files are corrupt, or the scales belong to another model.
    """
    from qdm_cli.engine.runtime.loading import open_pipeline

    return open_pipeline(folder, mode=mode, scales=scales, **kwargs)


register()
