"""Opens an export in a fresh interpreter and compares it with the model in memory (interface specification 8.8)."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdm_cli.engine.checkpoint import write_tensors
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.runtime import selfcheck_child
from qdm_cli.engine.runtime.selfcheck_child import tensor_hash

BOUNDS = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 3e-2}

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Probe:
    """Denoiser calls and what the model in memory answers.

    Attributes:
        calls: arguments by name, for the first, middle and last step.
        outputs: one tensor per call.
    """

    calls: list[Arguments]
    outputs: list[Tensor]


@torch.no_grad()
def run_probe(denoiser: nn.Module, calls: list[Arguments]) -> Probe:
    """Ask the model in memory."""
    return Probe(calls, [denoiser(**call, return_dict=False)[0] for call in calls])


@dataclass(frozen=True)
class Export:
    """A folder to check.

    Attributes:
        folder: the exported folder.
        component: name of the denoiser in the pipeline.
        model: the denoiser's diffusers class.
        expected: what every tensor must be after loading in `dtype`.
        dtype: float32, float16 or bfloat16.
        lone: the folder holds the denoiser alone.
        independent: it must load without qdm.
    """

    folder: Path
    component: str
    model: type[nn.Module]
    expected: dict[str, Tensor]
    dtype: str
    lone: bool
    independent: bool


def check_export(export: Export, probe: Probe, work: Path) -> dict[str, float]:
    """Load a folder twice in a fresh process and compare stored values exactly, outputs within the bound of the type.

    Args:
        work: folder for the probe file.

    Returns:
        {selfcheck_rel_rms, selfcheck_max_abs}

    Raises:
        GateFailed: it does not load, a stored value differs, or outputs differ by more than the bound.
    """
    work.mkdir(parents=True, exist_ok=True)
    names = [name for name in inspect.signature(export.model.forward).parameters if name != "self"]
    task = {
        "folder": str(export.folder),
        "component": export.component,
        "class": export.model.__name__ if export.lone else None,
        "dtype": export.dtype,
        "loader": None if export.independent else "qdm_cli",
        "roots": source_roots(),
        "threads": torch.get_num_threads(),
        "positional": names[:2],
        **write_probe(work / "probe.safetensors", probe),
    }
    result = _run_child(task)
    _compare_tensors(result["hashes"], export.expected)
    if result["problems"]:
        raise GateFailed(f"self-check: {result['problems'][0]}. Nothing was published.")
    bound = BOUNDS[export.dtype]
    # written so that NaN fails
    if not (result["finite"] and result["rel_rms"] <= bound):
        what = f"differ by {result['rel_rms']:.3g} (relative root mean square; bound {bound:g} in {export.dtype})"
        raise GateFailed(f"self-check: outputs of the reloaded export {what}. Nothing was published.")
    return {"selfcheck_rel_rms": result["rel_rms"], "selfcheck_max_abs": result["max_abs"]}


def write_probe(path: Path, probe: Probe) -> dict[str, Any]:
    """Write arguments and outputs to a safetensors file; returns the part of the task that describes them."""
    tensors = {f"output.{index}": value for index, value in enumerate(probe.outputs)}
    calls = [_encode(call, f"call.{index}", tensors)["items"] for index, call in enumerate(probe.calls)]
    write_tensors(path, {name: value.clone() for name, value in tensors.items()})
    return {"probe": str(path), "calls": calls}


def _encode(value: Any, name: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, dict):
        return {"items": {key: _encode(item, f"{name}.{key}", tensors) for key, item in value.items()}}
    return {"plain": value}


def source_roots() -> list[str]:
    """Folders that make qdm_cli and qdm_kernels importable, in an interpreter that ignores PYTHONPATH."""
    return [str(Path(sys.modules[name].__path__[0]).resolve().parent) for name in ("qdm_cli", "qdm_kernels")]


def _run_child(task: dict[str, Any]) -> dict[str, Any]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "QDM_MODE": "exact"}
    command = [sys.executable, "-I", str(Path(selfcheck_child.__file__).resolve()), json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise GateFailed(f"self-check: the export does not load or run in a fresh process: {last}. Nothing was published.")
    return json.loads(done.stdout.strip().splitlines()[-1])


def _compare_tensors(hashes: dict[str, str], expected: dict[str, Tensor]) -> None:
    if missing := sorted(set(expected) ^ set(hashes)):
        raise GateFailed(f"self-check: the reloaded export lacks or adds tensors, such as {missing[0]}. Nothing was published.")
    for name, value in expected.items():
        if tensor_hash(value) != hashes[name]:
            raise GateFailed(f"self-check: {name} was not read back as it was written. Nothing was published.")
