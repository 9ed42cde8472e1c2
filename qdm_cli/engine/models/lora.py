"""Merging LoRAs into a pipeline before anything else."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models.folder import PICKLES, check_safetensors

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import Lora


def merge_loras_(pipeline: Any, loras: Sequence[Lora], *, offline: bool) -> None:
    """Add each LoRA times its scale to the weights, in order; the adapters are gone afterwards.

    Raises:
        InputError: the pipeline takes no LoRA, or a file is missing, corrupt, a pickle, or for another model.
        EnvironmentProblem: peft is missing, or a hub id cannot be reached.
    """
    if not hasattr(pipeline, "load_lora_weights"):
        raise InputError(f"model.loras: {type(pipeline).__name__} takes no LoRA.", path="model.loras")
    if importlib.util.find_spec("peft") is None:
        raise EnvironmentProblem("model.loras needs peft: pip install 'qdm[train]'", path="model.loras")
    for index, lora in enumerate(loras):
        where = f"model.loras.{index}.path"
        local = _check_path(lora.path, where)
        try:
            pipeline.load_lora_weights(lora.path, adapter_name=f"qdm{index}", use_safetensors=True, local_files_only=local or offline)
            pipeline.fuse_lora(lora_scale=lora.scale, adapter_names=[f"qdm{index}"])
            pipeline.unload_lora_weights()
        except OSError as error:
            if local:
                raise InputError(f"{where}: {lora.path} cannot be read: {error}.", path=where) from error
            raise EnvironmentProblem(
                f"{where}: {lora.path} is not cached and cannot be fetched now. Download it and give its path."
            ) from error
        except Exception as error:
            text = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{where}: {lora.path} does not fit {type(pipeline).__name__}: {text}", path=where) from error


def _check_path(path: str, where: str) -> bool:
    """True = on this disk; checks the headers of its files."""
    place = Path(path).expanduser()
    if place.suffix in PICKLES:
        raise InputError(f"{where}: {path} is a pickle, and qdm never unpickles. Convert it to .safetensors.", path=where)
    if place.is_file() or place.is_dir():
        for file in [place] if place.is_file() else sorted(place.glob("*.safetensors")):
            check_safetensors(file)
        return True
    if place.suffix == ".safetensors" or path.startswith(("/", ".", "~")) or path.count("/") != 1:
        raise InputError(f"{where}: there is no file or folder {path}.", path=where)
    return False
