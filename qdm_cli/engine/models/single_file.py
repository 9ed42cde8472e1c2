"""One .safetensors file that holds a whole pipeline in its authors' own key names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import huggingface_hub
import torch
from diffusers.loaders.single_file_utils import fetch_diffusers_config
from safetensors import safe_open

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models.folder import PipelineFolder, check_safetensors, read_index
from qdm_cli.engine.models.source import cached_snapshot

_CONFIGS = ("*.json", "*/*.json", "*/*.txt", "*/*.model")


def load_single_file(path: Path, dtype: torch.dtype, *, offline: bool) -> Any:
    """Load the file through diffusers' key maps, with the configuration of the model family it belongs to.

    Raises:
        InputError: truncated, or not a whole pipeline of a family that diffusers knows.
        EnvironmentProblem: the family's configuration files are neither cached nor reachable.
    """
    folder = family_folder(path, offline=offline)
    try:
        return getattr(diffusers, folder.class_name).from_single_file(
            str(path), config=str(folder.path), dtype=dtype, local_files_only=True, **dict.fromkeys(folder.optional)
        )
    except Exception as error:
        text = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be loaded as a whole {folder.class_name}: {text}", path="model.id") from error


def family_folder(path: Path, *, offline: bool) -> PipelineFolder:
    """Configuration folder of the family that the file's keys and shapes belong to. Reads no weights."""
    check_safetensors(path)
    repository = fetch_diffusers_config(_shapes(path))["pretrained_model_name_or_path"]
    folder = cached_snapshot(repository, None)
    if folder is None and not offline:
        try:
            folder = Path(huggingface_hub.snapshot_download(repository, allow_patterns=list(_CONFIGS)))
        except Exception:
            # the classes of network errors belong to whatever HTTP library the hub client uses
            folder = None
    if folder is None:
        raise EnvironmentProblem(
            f"{path.name} needs the configuration files of {repository}, which are not in the local cache, and the hub cannot be reached. "
            f"Go online once (`hf download {repository} --include '*.json' '*/*.json' '*/*.txt'`), or give a diffusers folder as model.id."
        )
    return read_index(folder)


def _shapes(path: Path) -> dict[str, torch.Tensor]:
    """The file's tensors on the meta device: diffusers tells families apart by keys and shapes."""
    with safe_open(path, framework="pt") as handle:
        return {key: torch.empty(handle.get_slice(key).get_shape(), device="meta") for key in handle.keys()}
