"""Weight files that a recipe needs and that are not on this machine; fetching them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from qdm_cli.engine.errors import EnvironmentProblem
from qdm_cli.engine.models.folder import DROPPED, read_index
from qdm_cli.engine.models.source import hub_file, resolve_source

if TYPE_CHECKING:
    from qdm_cli.engine.models.source import Source
    from qdm_cli.engine.recipe.schema import Recipe

_NO_WEIGHTS = re.compile(r"Scheduler|Tokenizer|Processor|FeatureExtractor|Guider")
_INCEPTION = "weights-inception-2015-12-05-6726825d.pth"
_ALEXNET = "alexnet-owt-7be5be79.pth"


@dataclass(frozen=True)
class Missing:
    """One file, or the files of one component.

    Attributes:
        id: hub id, or the library that downloads it.
        file: name, with the start of its sha256 in it where the library names it so.
        needed: False = a metric is skipped without it.
    """

    id: str
    file: str
    needed: bool = True


def missing_weights(recipe: Recipe, *, smoke: bool = False, offline: bool = False) -> list[Missing]:
    """What a run would download.

    Raises:
        InputError, EnvironmentProblem: as `resolve_source`.
    """
    source = resolve_source(recipe.model, smoke=smoke, offline=offline)
    return [*(_of_hub(source, offline=offline) if source.kind == "hub" else []), *_of_metrics(recipe)]


def _of_hub(source: Source, *, offline: bool) -> list[Missing]:
    """Components whose weights are not in the Hugging Face cache."""
    index = hub_file(source, "model_index.json", offline=offline)
    if index is None:
        return []
    folder = read_index(index.parent)
    parts = [name for name, kind in folder.parts.items() if name not in DROPPED and not _NO_WEIGHTS.search(kind)]
    return [Missing(source.id, f"{name}/*.safetensors") for name in parts if not any(folder.part(name).glob("*.safetensors"))]


def _of_metrics(recipe: Recipe) -> list[Missing]:
    weights = recipe.evaluate.weights if recipe.evaluate else None
    if weights is None:
        return []
    checkpoints = Path(os.environ.get("TORCH_HOME", "~/.cache/torch")).expanduser() / "hub" / "checkpoints"
    wanted = [(weights.inception, "torch-fidelity", _INCEPTION), (weights.lpips, "torchvision", _ALEXNET)]
    return [
        Missing(library, file, needed=False) for value, library, file in wanted if value == "auto" and not (checkpoints / file).exists()
    ]


def fetch(recipe: Recipe, *, offline: bool = False) -> None:
    """Download what the model needs into the Hugging Face cache: configurations and safetensors of its components, nothing else.

    Raises:
        EnvironmentProblem: offline, or the hub cannot be reached.
    """
    if not missing_weights(recipe, offline=offline):
        return
    if offline:
        raise EnvironmentProblem("--fetch downloads, and --offline forbids it")
    source = resolve_source(recipe.model)
    if source.kind != "hub":
        return
    index = hub_file(source, "model_index.json", offline=False)
    folder = read_index(index.parent) if index else None
    parts = [name for name in folder.parts if name not in DROPPED] if folder else []
    allowed = ["*.json", *(f"{name}/*" for name in parts)]
    refused = ["*.bin", "*.ckpt", "*.pt", "*.pth", "*.pkl", "*.msgpack", "*.onnx*", "*.h5", "*.fp16.safetensors", "*.non_ema.safetensors"]
    try:
        huggingface_hub.snapshot_download(source.id, revision=source.commit, allow_patterns=allowed, ignore_patterns=refused)
    except OSError as error:
        raise EnvironmentProblem(f"{source.id} cannot be downloaded: {error}") from error
