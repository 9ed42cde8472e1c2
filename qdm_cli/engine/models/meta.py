"""The denoiser without its weights, for `plan` and `validate --strict-model`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import diffusers
from accelerate import init_empty_weights
from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.denoiser import pick_component
from qdm_cli.engine.models.folder import PipelineFolder, read_index
from qdm_cli.engine.models.source import Source, hub_file, resolve_source

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import ModelSpec


def meta_denoiser(model: ModelSpec, *, smoke: bool = False, offline: bool = False) -> tuple[str, nn.Module, str]:
    """(component name, denoiser on the meta device, pipeline class name); reads configuration files only.

    Raises:
        InputError, EnvironmentProblem: as `load_pipeline`.
    """
    source = resolve_source(model, smoke=smoke, offline=offline)
    if source.kind == "tiny":
        from qdm_cli.engine.models.tiny import tiny_class, tiny_denoiser

        module = tiny_denoiser(source.name).to("meta")
        return pick_component({_tiny_component(module): module}, model.component, tiny_class(source.name)), module, tiny_class(source.name)
    folder = _configs(source, offline)
    component = pick_component(folder.parts, model.component, folder.class_name)
    config = _hub_config(source, component, offline) if source.kind == "hub" else folder.config(component)
    return component, _empty(folder.parts[component], config), folder.class_name


def _tiny_component(module: nn.Module) -> str:
    return "unet" if type(module).__name__.startswith("UNet") else "transformer"


def _configs(source: Source, offline: bool) -> PipelineFolder:
    if source.kind == "file":
        # diffusers' key maps take seconds to import
        from qdm_cli.engine.models.single_file import family_folder

        assert source.path is not None
        return family_folder(source.path, offline=offline)
    if source.kind != "hub":
        assert source.path is not None
        return read_index(source.path)
    index = hub_file(source, "model_index.json", offline=offline)
    if index is None:
        raise InputError(f"model.id: {source.id} is no diffusers pipeline: it has no model_index.json.", path="model.id")
    return read_index(index.parent)


def _hub_config(source: Source, component: str, offline: bool) -> dict[str, Any]:
    path = hub_file(source, f"{component}/config.json", offline=offline) or hub_file(source, "config.json", offline=offline)
    if path is None:
        raise InputError(f"model.id: {source.id} has no configuration of its {component}.", path="model.id")
    return json.loads(path.read_text(encoding="utf-8"))


def _empty(class_name: str, config: dict[str, Any]) -> nn.Module:
    if not hasattr(diffusers, class_name):
        raise InputError(f"this diffusers ({diffusers.__version__}) has no model class {class_name}.", path="model.id")
    with init_empty_weights():
        module = getattr(diffusers, class_name).from_config(config)
    return module.to("meta")
