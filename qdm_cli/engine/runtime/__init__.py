"""What runs an exported denoiser: packed layers, and their registration with diffusers. Imports torch and diffusers only on use."""

from __future__ import annotations

from typing import Any

_HOME = {
    "pack_denoiser_": "modules",
    "predicted_bytes": "size",
    "open_pipeline": "loading",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
