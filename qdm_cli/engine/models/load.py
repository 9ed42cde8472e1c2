"""Loading diffusers pipelines: from the hub, a folder, one file, the package or a seed; safetensors only, no foreign code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import diffusers
import torch
import transformers
from torch import nn

from qdm_cli.engine.errors import EnvironmentProblem, InputError, QdmError
from qdm_cli.engine.models.denoiser import find_denoiser, pick_component
from qdm_cli.engine.models.folder import MissingWeights, PipelineFolder, check_weights, read_index
from qdm_cli.engine.models.identity import license_of, model_digest
from qdm_cli.engine.models.lora import merge_loras_
from qdm_cli.engine.models.memory import align_
from qdm_cli.engine.models.schedulers import with_scheduler
from qdm_cli.engine.models.source import Source, hub_file, not_available, resolve_source

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline ready to sample: evaluation mode, no gradients, progress bars off, scheduler of the sampler.

    Attributes:
        pipeline: the diffusers pipeline.
        component: name of the denoiser in it.
        denoiser: the denoiser.
        identity: {id, revision, class, digest, license}.
    """

    pipeline: Any
    component: str
    denoiser: nn.Module
    identity: dict[str, Any]


def load_pipeline(
    model: ModelSpec, sampler: SamplerSpec, *, device: str = "cpu", smoke: bool = False, offline: bool = False, offload: str = "none"
) -> LoadedPipeline:
    """Load `model.id` with the scheduler of `sampler`.

    Args:
        smoke: a tiny random pipeline of the same family in float32 instead of the model.
        offline: never ask the hub.
        offload: none | model | group, of a CUDA device; no effect on a CPU.

    Raises:
        InputError: no such model, corrupt files, pickles, foreign code, no denoiser, unknown or unfit scheduler.
        EnvironmentProblem: not reachable, or a package is missing.
    """
    source = resolve_source(model, smoke=smoke, offline=offline)
    dtype = torch.float32 if smoke else DTYPES[model.dtype]
    with quiet():
        pipeline = _build(source, dtype, model.component, offline)
        if model.loras and not smoke:
            merge_loras_(pipeline, model.loras, offline=offline)
        pipeline = with_scheduler(pipeline, sampler.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    component, denoiser = find_denoiser(pipeline, model.component)
    _place_(pipeline, device, offload)
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.eval().requires_grad_(False)
            align_(part)
    identity = {
        "id": source.id,
        "revision": source.commit,
        "class": type(pipeline).__name__,
        "digest": model_digest(model, smoke=smoke, offline=offline),
        "license": license_of(source),
    }
    return LoadedPipeline(pipeline, component, denoiser, identity)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and notices of diffusers and transformers off the terminal."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, shown in zip(libraries, before, bars, strict=True):
            library.set_verbosity(level)
            if shown:
                library.enable_progress_bar()


def _build(source: Source, dtype: torch.dtype, component: str, offline: bool) -> Any:
    if source.kind == "tiny":
        from qdm_cli.engine.models.tiny import build_tiny

        return build_tiny(source.name).to(dtype)
    if source.kind == "file":
        # diffusers' key maps take seconds to import
        from qdm_cli.engine.models.single_file import load_single_file

        assert source.path is not None
        return load_single_file(source.path, dtype, offline=offline)
    if source.kind == "hub":
        return _load_hub(source, dtype, component, offline)
    assert source.path is not None
    return load_folder(read_index(source.path), dtype, component)


def _load_hub(source: Source, dtype: torch.dtype, component: str, offline: bool) -> Any:
    """Download what is missing (safetensors only), then load the snapshot like a folder."""
    index = hub_file(source, "model_index.json", offline=offline)
    if index is None:
        raise InputError(f"model.id: {source.id} is no diffusers pipeline: it has no model_index.json.", path="model.id")
    read_index(index.parent)  # refuses foreign code before gigabytes are fetched
    trouble = None
    if not offline:
        try:
            diffusers.DiffusionPipeline.download(source.id, revision=source.commit, use_safetensors=True)
        except Exception as error:
            trouble = error
    try:
        return load_folder(read_index(index.parent), dtype, component)
    except MissingWeights as error:
        if trouble is not None:
            raise EnvironmentProblem(f"{source.id} cannot be downloaded: {_first_line(trouble)}. {error}") from trouble
        raise not_available(source.id, f"A part of the weights ({error}) of") from error


def load_folder(folder: PipelineFolder, dtype: torch.dtype, component: str = "auto") -> Any:
    """Load a checked pipeline folder from disk alone.

    Raises:
        InputError: the files are corrupt or do not fit the classes, or the denoiser is missing or quantized already.
        EnvironmentProblem: a package that the pipeline needs is missing.
    """
    name = pick_component(folder.parts, component, folder.class_name)
    if "quantization_config" in folder.config(name):
        raise InputError(f"model.id: {name} in {folder.path} is quantized already. Give the original model.", path="model.id")
    variant = check_weights(folder)
    try:
        return getattr(diffusers, folder.class_name).from_pretrained(
            folder.path,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            variant=variant,
            **dict.fromkeys(folder.optional),
        )
    except QdmError:
        raise
    except ImportError as error:
        raise EnvironmentProblem(f"{folder.class_name} needs a package that is not installed: {_first_line(error)}.") from error
    except Exception as error:
        raise InputError(f"{folder.path} cannot be loaded as {folder.class_name}: {_first_line(error)}.", path="model.id") from error


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__


def _place_(pipeline: Any, device: str, offload: str) -> None:
    if offload == "none" or not device.startswith("cuda"):
        pipeline.to(device)
    elif offload == "model":
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.enable_group_offload(onload_device=torch.device(device), offload_type="leaf_level")
