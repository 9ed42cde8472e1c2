"""What may be loaded from a pipeline folder: whole safetensors files of stock classes; never pickles, never code."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from qdm_cli.engine.errors import InputError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# parts of a pipeline that qdm never calls and that would need further downloads
DROPPED = ("safety_checker", "feature_extractor", "image_encoder", "watermarker")
_WEIGHTLESS = re.compile(r"Scheduler|Tokenizer|Processor|FeatureExtractor|Guider")
_LIBRARIES = ("diffusers", "transformers")


class MissingWeights(InputError):
    """A component has no weight file at all."""


@dataclass(frozen=True)
class PipelineFolder:
    """A checked `model_index.json`.

    Attributes:
        path: the folder.
        class_name: diffusers pipeline class.
        parts: component name -> class name, without null components.
        optional: components of `DROPPED` that the pipeline class can do without.
    """

    path: Path
    class_name: str
    parts: dict[str, str]
    optional: tuple[str, ...]

    def part(self, name: str) -> Path:
        """Folder of a component: its own, or the root in old one-model repositories (google/ddpm-*)."""
        return self.path / name if (self.path / name).is_dir() else self.path

    def config(self, name: str) -> dict[str, Any]:
        """`config.json` of a component."""
        path = self.part(name) / "config.json"
        if not path.is_file():
            raise InputError(f"{path} is missing: {self.path} is no complete {self.class_name}.")
        return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: unreadable or no object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object.")
    return value


def read_index(path: Path) -> PipelineFolder:
    """Read and check `model_index.json` without looking at weights.

    Raises:
        InputError: no pipeline folder, an unknown pipeline class, or components that are code in the folder.
    """
    index = path / "model_index.json"
    if not index.is_file():
        raise InputError(f"{path} is no diffusers pipeline folder: model_index.json is missing.")
    content = read_json(index)
    class_name = content.get("_class_name")
    if not isinstance(class_name, str):
        raise InputError(f"{index} asks for code of its own ({class_name!r}). qdm never runs code from a model folder.")
    if not hasattr(diffusers, class_name):
        raise InputError(f"{index}: this diffusers ({diffusers.__version__}) has no pipeline {class_name}.")
    parts = {}
    for name, value in content.items():
        if name.startswith("_") or not isinstance(value, list) or len(value) != 2 or value[1] is None:
            continue
        _refuse_code(index, name, value[0], path)
        parts[name] = str(value[1])
    # some classes list these parts as optional, others take None all the same
    known = set(getattr(getattr(diffusers, class_name), "_optional_components", ()))
    return PipelineFolder(path, class_name, parts, tuple(name for name in DROPPED if name in parts and name in known))


def _refuse_code(index: Path, name: str, library: Any, folder: Path) -> None:
    if library in _LIBRARIES or (isinstance(library, str) and hasattr(diffusers.pipelines, library)):
        return
    if (folder / name / f"{library}.py").is_file() or (folder / f"{library}.py").is_file():
        raise InputError(f"{index} loads {name} from {library}.py in the folder. qdm never runs code from a model folder.")
    raise InputError(f"{index} takes {name} from {library!r}; qdm loads parts of diffusers and transformers only.")


def check_weights(folder: PipelineFolder) -> str | None:
    """Look at every weight file's header; returns the variant to load (`fp16`) or None.

    Raises:
        InputError: a file is truncated or corrupt (named), a shard is missing, or there are only pickles.
        MissingWeights: a component has no weights at all.
    """
    variant = None
    for name, class_name in folder.parts.items():
        if name in folder.optional or _WEIGHTLESS.search(class_name):
            continue
        part = folder.part(name)
        files = sorted(part.glob("*.safetensors"))
        if not files:
            raise _no_safetensors(part, name)
        for file in files:
            check_safetensors(file)
        for shard_index in part.glob("*.safetensors.index*.json"):
            _check_shards(shard_index)
        variants = {match[1] for file in files if (match := re.search(r"\.(fp16|bf16|non_ema)(-\d+-of-\d+)?\.safetensors$", file.name))}
        if variants and all(re.search(r"\.(fp16|bf16|non_ema)", file.name) for file in files):
            variant = sorted(variants)[0]
    return variant


def _no_safetensors(part: Path, name: str) -> InputError:
    pickles = sorted(file.name for file in part.iterdir() if file.suffix in PICKLES)
    if pickles:
        text = f"{part} holds {name} only as a pickle ({pickles[0]}). qdm never unpickles: convert it to .safetensors first."
        return InputError(text, path="model.id")
    return MissingWeights(f"{part} holds no weights of {name} (*.safetensors).", path="model.id")


def _check_shards(index: Path) -> None:
    shards = read_json(index).get("weight_map", {})
    for shard in sorted(set(shards.values())):
        if not (index.parent / shard).is_file():
            raise InputError(f"{index.parent / shard} is missing, though {index.name} lists it.")


def check_safetensors(path: Path) -> None:
    """Compare a file's header with its size; reads the header alone.

    Raises:
        InputError: truncated or no safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise InputError(f"{path} is truncated or no safetensors file ({size} bytes). Download or copy it again.")
        try:
            header = json.loads(handle.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is corrupt: its header cannot be read. Download or copy it again.") from error
    if size != 8 + length + end:
        raise InputError(f"{path} is truncated: {size} bytes instead of {8 + length + end}. Download or copy it again.")
