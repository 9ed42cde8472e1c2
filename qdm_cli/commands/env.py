"""`qdm env`."""

from __future__ import annotations

import os
import platform
from importlib import import_module
from typing import TYPE_CHECKING, Any

from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

_PACKAGES = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "pydantic",
    "typer",
    "torchmetrics",
    "triton",
    "torchvision",
    "peft",
)


def env() -> Result:
    """Versions, devices, which kernels run here and why others do not, and whether diffusers knows the qdm format. For bug reports."""
    data = {
        "qdm": _qdm(),
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": _packages(),
        "devices": _devices(),
        "kernels": _kernels(),
        "diffusers_registration": _registration(),
        "variables": {name: value for name, value in sorted(os.environ.items()) if name.startswith("QDM_") or name == "HF_HUB_OFFLINE"},
    }
    return Result(data=data, human=lambda console: _show(console, data))


def _qdm() -> dict[str, str | None]:
    from qdm_cli.engine.run.host import git_commit, qdm_version

    return {"version": qdm_version(), "commit": git_commit()}


def _packages() -> dict[str, str | None]:
    from qdm_cli.engine.run.host import package_version

    return {name: package_version(name) for name in _PACKAGES}


def _devices() -> list[dict[str, Any]]:
    import psutil
    import torch

    cpu = {"name": "cpu", "what": _cpu_name(), "threads": torch.get_num_threads(), "memory_bytes": psutil.virtual_memory().total}
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [cpu, *(_gpu(index) for index in range(count))]


def _gpu(index: int) -> dict[str, Any]:
    import torch

    facts = torch.cuda.get_device_properties(index)
    return {"name": f"cuda:{index}", "what": f"{facts.name} sm_{facts.major}{facts.minor}", "memory_bytes": facts.total_memory}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as handle:
            return next(line.split(":", 1)[1].strip() for line in handle if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _kernels() -> list[dict[str, Any]]:
    """Per op and kind of device: the backend that runs, and why each other one does not."""
    import torch

    from qdm_kernels import backend

    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows: list[dict[str, Any]] = []
    for op in backend.OPS:
        for kind in kinds:
            refusals = {name: backend.why_not(name, op, device=kind) for name in backend.BACKENDS}
            refused = {name: why for name, why in refusals.items() if why}
            rows.append({"op": op, "device": kind, "runs": backend.choose(op, device=kind), "refused": refused})
    return rows


def _registration() -> dict[str, str | None]:
    """Asked after the import of diffusers' own table, which is what the registration waits for."""
    from qdm_cli.engine.runtime.registration import TARGET, registration_status

    import_module(TARGET)
    return dict(registration_status())


def _show(console: Console, data: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("qdm", f"{data['qdm']['version']} ({(data['qdm']['commit'] or 'no commit')[:10]})")
    table.add_row("python", data["python"])
    for name, version in data["packages"].items():
        table.add_row(name, version or "not installed")
    for device in data["devices"]:
        table.add_row(device["name"], f"{device['what']}, {device['memory_bytes'] / 2**30:.1f} GiB")
    for row in data["kernels"]:
        reasons = "".join(f"; not {name}: {why}" for name, why in row["refused"].items())
        table.add_row(f"{row['op']} on {row['device']}", f"{row['runs']}{reasons}")
    state = data["diffusers_registration"]
    table.add_row("qdm in diffusers", " ".join(filter(None, (state["state"], state["why"]))))
    for name, value in data["variables"].items():
        table.add_row(name, value)
    console.print(table)
