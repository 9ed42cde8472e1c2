"""Self-describing result folders: `qdm.json`, what it says, and how it is checked. Imports neither torch nor diffusers."""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from qdm_cli.engine.errors import InputError

SCHEMA = 1
MANIFEST = "qdm.json"
Kind = Literal["calibrated", "finetuned", "cached", "exported", "evaluated"]

FULL_HASH_BYTES = 64 * 2**20
"""Larger files are opened by size and safetensors header alone (`full=True` hashes them too): hashing 4 GB takes 10 s."""

# Files that tell how a result came to be (times, comments, paths) and not what it is: outside the digest.
_STORY = {"recipe.yaml", "recipe.resolved.yaml", "run.log", "metrics.jsonl"}
_STORY_SUFFIXES = {".log", ".md", ".html"}
_STORY_FOLDERS = {"tb"}


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, use_attribute_docstrings=True)


class FileEntry(_Part):
    """One file of the artifact."""

    bytes: int
    """Size."""
    sha256: str
    """Hash of the content."""


class Parent(_Part):
    """Where the input of a stage came from."""

    path: str
    """Folder at that time."""
    digest: str
    """Its digest."""


class Manifest(_Part):
    """`qdm.json`, the same for every stage."""

    schema_: int = Field(SCHEMA, alias="schema")
    """Version of this format."""
    kind: Kind
    """What the folder holds."""
    stage: str
    """The command that wrote it."""
    key: str
    """sha256 of all that determines the result."""
    digest: str
    """sha256 over names and hashes of the result's files; equal results have equal digests, whenever and wherever made."""
    files: dict[str, FileEntry]
    """Every file except `qdm.json` and `run.log`."""
    qdm: dict[str, str | None] = {}
    """Version and git commit of qdm."""
    command: list[str] = []
    """Command line."""
    recipe_sha256: str = ""
    """Hash of the resolved recipe."""
    parents: list[Parent] = []
    """Artifacts that it was made from, nearest first."""
    base_model: dict[str, Any] = {}
    """id, revision, class, digest and licence of the uncompressed model."""
    sampler: dict[str, Any] = {}
    """Sampler of deployment; the next stage refuses another one."""
    seeds: dict[str, Any] = {}
    """Seeds of everything random."""
    smoke: bool = False
    """True = made by --smoke from a shrunken random model."""
    environment: dict[str, str | None] = {}
    """Versions of python, torch, diffusers and so on, and the device."""
    seconds: dict[str, float] = {}
    """Wall-clock time per phase."""
    peak_bytes: dict[str, int] = {}
    """Peak memory: `cpu` (resident set of the process), `gpu`."""
    layers: list[dict[str, Any]] = []
    """One entry per layer: bits, granularity, rule, bytes, or why it was skipped."""
    bytes_by_part: dict[str, int] = {}
    """Bytes measured from the written files."""
    metrics: dict[str, Any] = {}
    """Numbers; a metric that could not run is null, with `<name>_why`."""
    warnings: list[str] = []
    """Warnings of the run."""
    simulated: bool = True
    """True = no integer kernel runs in this artifact."""
    verified: str = "none"
    """load, layout or none."""
    gate: str | None = None
    """Condition of `evaluate.fail_if` that was true; null = passed."""
    primary: str | None = None
    """File that is the result; null = the folder."""


@dataclass(frozen=True)
class Artifact:
    """A finished stage: an absolute folder and its manifest."""

    folder: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        """Path of a file inside the folder.

        Raises:
            InputError: there is no such file.
        """
        path = self.folder / name
        if not path.exists():
            raise InputError(f"{self.folder} is a {self.manifest.kind} artifact without {name}; run the stage again with --fresh")
        return path

    @property
    def result(self) -> Path:
        """What is printed on stdout: the primary file, else the folder."""
        return self.folder / self.manifest.primary if self.manifest.primary else self.folder


def open_artifact(path: str | Path, *, full: bool = False) -> Artifact:
    """Open and check a folder that a stage published; a path to a file means its folder.

    Every file is checked by size, up to 64 MB also by hash, above by its safetensors header; `full` hashes all.

    Raises:
        InputError: no such folder, no or a broken manifest, a file that is missing, truncated or changed.
    """
    folder = Path(path).expanduser()
    if not folder.exists():
        raise InputError(f"{folder}: no such artifact")
    folder = Path(os.path.abspath(folder.parent if folder.is_file() else folder)).resolve()
    manifest = _read_manifest(folder)
    for name, entry in manifest.files.items():
        _check_file(folder / name, entry, full=full)
    if digest_of(manifest.files) != manifest.digest:
        raise InputError(f"{folder / MANIFEST}: the digest does not belong to the files it lists; the manifest was changed")
    return Artifact(folder, manifest)


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.is_file():
        unfinished = " (an unfinished run: repeat its command to continue it)" if (folder / "state.json").is_file() else ""
        raise InputError(f"{folder} is not an artifact of qdm: it has no {MANIFEST}{unfinished}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(data, dict) and isinstance(data.get("schema"), int) and data["schema"] > SCHEMA:
            raise InputError(f"{path}: schema {data['schema']} was written by a newer qdm; this one reads up to {SCHEMA}")
        return Manifest.model_validate(data)
    except ValidationError as error:
        field = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(f"{path}: not a manifest of qdm ({field}: {error.errors()[0]['msg'].lower()})") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def _check_file(path: Path, entry: FileEntry, *, full: bool) -> None:
    try:
        size = path.stat().st_size
        if size != entry.bytes:
            raise InputError(f"{path}: truncated or changed, it has {size} bytes and the manifest says {entry.bytes}")
        if full or size <= FULL_HASH_BYTES:
            if hash_file(path) != entry.sha256:
                raise InputError(f"{path}: its content does not match the hash in the manifest; the file is corrupt")
        elif path.suffix == ".safetensors":
            check_safetensors(path)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, although the manifest lists it") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def check_safetensors(path: Path) -> None:
    """Header of a safetensors file: well-formed, and its offsets end where the file ends.

    Raises:
        InputError: corrupt or truncated.
    """
    size = path.stat().st_size
    try:
        with open(path, "rb") as handle:
            (length,) = struct.unpack("<Q", handle.read(8))
            if length > size - 8:
                raise ValueError("the header is longer than the file")
            header = json.loads(handle.read(length))
        end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
        if 8 + length + end != size:
            raise ValueError(f"its header describes {8 + length + end} bytes, the file has {size}")
    except (ValueError, struct.error, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{path}: corrupt or truncated safetensors file ({error})") from None


def hash_file(path: Path) -> str:
    """sha256 of a file's content, hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """sha256 of canonical JSON (sorted keys, no spaces), hex."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(files: dict[str, FileEntry]) -> str:
    """sha256 over names and hashes of the files that are the result: no times, no paths, no host."""
    return hash_json({name: entry.sha256 for name, entry in files.items() if not _is_story(name)})


def _is_story(name: str) -> bool:
    path = Path(name)
    return name in _STORY or path.suffix in _STORY_SUFFIXES or path.parts[0] in _STORY_FOLDERS


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` except the manifest and `run.log`, by relative POSIX name, sorted."""
    names = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    chosen = {name: path for name, path in names.items() if name not in (MANIFEST, "run.log")}
    return {name: FileEntry(bytes=path.stat().st_size, sha256=hash_file(path)) for name, path in chosen.items()}


def write_text(path: Path, text: str) -> None:
    """Write through a temporary name, fsync, rename: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def finite(value: Any) -> Any:
    """JSON value with NaN and infinity replaced by null, which strict readers accept."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def write_json(path: Path, value: Any) -> None:
    """`write_text` of indented JSON."""
    write_text(path, json.dumps(finite(value), indent=2, allow_nan=False, default=str) + "\n")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `qdm.json` into a folder that is not yet published."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json", by_alias=True))
