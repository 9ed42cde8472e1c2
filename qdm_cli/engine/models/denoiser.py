"""Finding the denoiser of a pipeline."""

from __future__ import annotations

from typing import Any

from torch import nn

from qdm_cli.engine.errors import InputError

DENOISERS = ("unet", "transformer")


def pick_component(names: dict[str, Any], component: str, pipeline_class: str) -> str:
    """Name of the denoiser among `names` (component name -> anything that is not None).

    Raises:
        InputError: the pipeline has no such component.
    """
    wanted = DENOISERS if component == "auto" else (component,)
    for name in wanted:
        if names.get(name) is not None:
            return name
    present = ", ".join(sorted(name for name, value in names.items() if value is not None)) or "nothing"
    what = "no denoiser (a component called unet or transformer)" if component == "auto" else f"no component called {component!r}"
    raise InputError(f"model.component: {pipeline_class} has {what}. It has: {present}.", path="model.component")


def find_denoiser(pipeline: Any, component: str = "auto") -> tuple[str, nn.Module]:
    """(component name, module) of the part that is called once per denoising step.

    Raises:
        InputError: the pipeline has none.
    """
    parts = dict(pipeline.components)
    name = pick_component(parts, component, type(pipeline).__name__)
    if not isinstance(parts[name], nn.Module):
        raise InputError(f"model.component: {name} of {type(pipeline).__name__} is no torch module.", path="model.component")
    return name, parts[name]
