"""A personalisation: scales per layer and time-step interval for a shared integer model, in one small file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.errors import InputError

SCALES_FILE = "scales.safetensors"
SCALES_SCHEMA = 1


@dataclass(frozen=True)
class LayerScales:
    """Scales of one layer. n = 1 where all intervals share them.

    Attributes:
        out: f32 [n, O], factors of (x * s_in) (W_q - z); with grouped weight scales, factors on top of those.
        in_: f32 [n, I], factors of the input channels; None = ones.
    """

    out: Tensor
    in_: Tensor | None = None


@dataclass(frozen=True)
class ScaleSet:
    """All scales of a personalisation.

    Attributes:
        base: digest of the integer weights they belong to (`codes_digest`).
        layers: by module path.
        keys: f64 [n], ascending: smallest timestep of each interval, in the units of the denoiser's argument `timestep`.
        about: method, prompts and other facts for people.
    """

    base: str
    layers: dict[str, LayerScales]
    keys: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.float64))
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def experts(self) -> int:
        return len(self.keys)

    @property
    def count(self) -> int:
        """Numbers in the set."""
        return sum(layer.out.numel() + (0 if layer.in_ is None else layer.in_.numel()) for layer in self.layers.values())


def codes_digest(layers: Iterable[tuple[str, int, Tensor, Tensor]]) -> str:
    """sha256 of integer weights: what a scale set is trained for, whether it lies in an artifact or in an exported folder.

    Args:
        layers: (module path, bits, packed codes of `pack_codes`, int8 zero points), in any order.
    """
    digest = hashlib.sha256()
    for name, bits, packed, zero_point in sorted(layers, key=lambda layer: layer[0]):
        digest.update(f"{name} {bits} {tuple(packed.shape)} {tuple(zero_point.shape)}\n".encode())
        for tensor in (packed, zero_point):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def write_scales(path: Path, scales: ScaleSet) -> None:
    """Write one safetensors file; its header names the base."""
    tensors = {"keys": scales.keys.double()}
    for name, layer in scales.layers.items():
        tensors[f"{name}:out"] = layer.out.float()
        if layer.in_ is not None:
            tensors[f"{name}:in"] = layer.in_.float()
    write_tensors(path, tensors, {"schema": SCALES_SCHEMA, "kind": "scales", "base": scales.base, "about": scales.about})


def read_scales(path: str | Path) -> ScaleSet:
    """Read what `write_scales` wrote; a folder means the file in it.

    Raises:
        InputError: no such file, not a scale file, or of a newer schema.
    """
    path = Path(path).expanduser()
    path = path / SCALES_FILE if path.is_dir() else path
    if not path.is_file():
        raise InputError(f"{path}: no such scale file")
    try:
        tensors, meta = read_tensors(path)
    except Exception as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if meta.get("kind") != "scales" or "keys" not in tensors:
        raise InputError(f"{path} is no scale file: `qdm finetune` with method peqa or tuneqdm writes {SCALES_FILE}")
    if meta["schema"] > SCALES_SCHEMA:
        raise InputError(f"{path}: schema {meta['schema']} was written by a newer qdm; this one reads up to {SCALES_SCHEMA}")
    names = [key.rpartition(":")[0] for key in tensors if key.endswith(":out")]
    layers = {name: LayerScales(tensors[f"{name}:out"], tensors.get(f"{name}:in")) for name in names}
    return ScaleSet(meta["base"], layers, tensors["keys"], meta.get("about", {}))


def check_base(scales: ScaleSet, digest: str, what: str) -> None:
    """
    Raises:
        InputError: `scales` were trained for other integer weights than `digest`'s.
    """
    if scales.base != digest:
        raise InputError(f"{what}: these scales belong to integer weights {scales.base[:12]}, this model has {digest[:12]}")
