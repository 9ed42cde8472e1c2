"""Training state on disk: safetensors, never pickle, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Optimizer state as `optimizer.<index>.<slot>` tensors (index = position in the parameter groups)."""
    state = optimizer.state_dict()["state"]
    return {
        f"optimizer.{index}.{slot}": value.detach().clone()
        for index, slots in state.items()
        for slot, value in slots.items()
        if isinstance(value, torch.Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """Inverse of `flatten_optimizer`; parameters that never had a gradient have no entry and stay fresh."""
    current = optimizer.state_dict()
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, slot = key.split(".", 2)
            state.setdefault(int(index), {})[slot] = value
    optimizer.load_state_dict({"state": state, "param_groups": current["param_groups"]})


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict[str, Any] | None = None) -> None:
    """Write a safetensors file through a temporary name, fsync, rename: a reader never sees half a file.

    Zero-dimensional and non-contiguous tensors are accepted; `meta` is stored as one JSON string, under one key: safetensors writes
    several keys in random order, and equal results must be equal files.
    """
    payload = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    temporary = path.with_name(path.name + ".tmp")
    save_file(payload, temporary, metadata={"meta": json.dumps(meta or {})})
    with open(temporary, "rb") as handle:
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read what `write_tensors` wrote: (tensors, meta)."""
    with safe_open(path, framework="pt") as handle:
        meta = json.loads((handle.metadata() or {}).get("meta", "{}"))
        return {name: handle.get_tensor(name) for name in handle.keys()}, meta
