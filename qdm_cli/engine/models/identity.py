"""Fingerprint and licence of a model, without loading it."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qdm_cli.engine.models.denoiser import pick_component
from qdm_cli.engine.models.folder import PipelineFolder, read_index
from qdm_cli.engine.models.source import Source, resolve_source

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import ModelSpec

_FILE_HASHES: dict[tuple[str, int, int], str] = {}


def model_digest(model: ModelSpec, *, smoke: bool = False, offline: bool = False) -> str:
    """sha256 (hex) of what decides the denoiser's outputs; equal on every machine that has the same model.

    Folder and builtin: names and contents of the denoiser's configuration and weights, and of the scheduler's configuration.
    One file: its content. Hub: the commit, which fixes every file. Tiny: name and version. LoRAs are part of it, except in smoke runs.

    Raises:
        InputError, EnvironmentProblem: as `resolve_source`.
    """
    source = resolve_source(model, smoke=smoke, offline=offline)
    lines = source_lines(source, model.component)
    if not smoke:
        lines += [f"lora {lora.scale} {_lora_line(lora.path)}" for lora in model.loras]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def source_lines(source: Source, component: str) -> list[str]:
    """What `model_digest` hashes, one line per fact."""
    if source.kind == "tiny":
        from qdm_cli.engine.models.tiny import TINY_VERSION, tiny_class

        return [f"tiny {source.name} {tiny_class(source.name)} {TINY_VERSION}"]
    if source.kind == "hub":
        return [f"hub {source.commit}"]
    assert source.path is not None
    if source.kind == "file":
        return [f"file {file_sha256(source.path)}"]
    return [f"{name} {file_sha256(path)}" for name, path in _denoiser_files(read_index(source.path), component)]


def _denoiser_files(folder: PipelineFolder, component: str) -> list[tuple[str, Path]]:
    part = folder.part(pick_component(folder.parts, component, folder.class_name))
    files = [path for pattern in ("*.json", "*.safetensors") for path in part.glob(pattern)]
    files += (folder.path / "scheduler").glob("*.json")
    return sorted((path.relative_to(folder.path).as_posix(), path) for path in files if path.name != "model_index.json")


def _lora_line(path: str) -> str:
    place = Path(path).expanduser()
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    return " ".join(file_sha256(file) for file in files) if files else path


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, streamed; remembered for this process while size and time of change stay."""
    stat = path.stat()
    key = (str(path.resolve()), stat.st_size, stat.st_mtime_ns)
    if key not in _FILE_HASHES:
        digest = hashlib.sha256()
        with open(path, "rb") as handle:
            while block := handle.read(1 << 20):
                digest.update(block)
        _FILE_HASHES[key] = digest.hexdigest()
    return _FILE_HASHES[key]


def license_of(source: Source) -> str | None:
    """Licence from the model card's front matter; None = unknown, and for random weights."""
    if source.license or source.path is None or source.kind == "file":
        return source.license
    card = source.path / "README.md"
    if not card.is_file():
        return None
    match = re.match(r"---\s*\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    found = re.search(r"^license:\s*(\S+)", match[1], re.MULTILINE) if match else None
    return found[1].strip("\"'") if found else None
