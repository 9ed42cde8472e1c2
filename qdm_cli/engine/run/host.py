"""The machine: device choice, seeds, peak memory, versions. Imports torch inside its functions only."""

from __future__ import annotations

import os
import platform
import random
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from qdm_cli.engine.errors import EnvironmentProblem, InputError

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy", "triton")


def resolve_device(name: str) -> str:
    """`auto` -> `cuda` where there is a usable GPU, else `cpu`; others are checked.

    Raises:
        InputError: not the name of a device.
        EnvironmentProblem: the device is not there.
    """
    kind, _, index = name.partition(":")
    if name not in ("auto", "cpu") and (kind != "cuda" or (index and not index.isdigit())):
        raise InputError(f"device {name!r} is not one of auto, cpu, cuda, cuda:N", path="device.name")
    if name == "cpu":
        return name
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if count else "cpu"
    if int(index or 0) >= count:
        built = "this torch is built without CUDA" if torch.version.cuda is None else f"{count} usable"
        raise EnvironmentProblem(f"device {name}: there is no such GPU ({built}); use --device cpu")
    return name


def seed_everything(seed: int, threads: int | None) -> None:
    """Seeds of python, numpy and torch, and deterministic algorithms where torch has them."""
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads is not None:
        torch.set_num_threads(threads)


def reset_peak(device: str) -> None:
    """Start measuring peak memory anew; without permission the peak is that of the whole process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: str) -> dict[str, int]:
    """Peak since `reset_peak`: resident set of this process (`cpu`), allocations of torch (`gpu`)."""
    peaks = {"cpu": _peak_resident()}
    if device.startswith("cuda"):
        import torch

        peaks["gpu"] = int(torch.cuda.max_memory_allocated(device))
    return peaks


def _peak_resident() -> int:
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def package_version(name: str) -> str | None:
    """Installed version; None = not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def qdm_version() -> str:
    """Version of the installed package, `0.0.0` when it runs from a bare checkout."""
    return package_version("qdm") or "0.0.0"


def environment(device: str) -> dict[str, str | None]:
    """Versions and device, for the manifest. No host name: equal runs on two machines describe themselves alike."""
    found = {"python": platform.python_version(), "platform": f"{platform.system()} {platform.machine()}", "device": device}
    facts: dict[str, str | None] = {**found, **{name: package_version(name) for name in PACKAGES}}
    if device.startswith("cuda"):
        import torch

        facts |= {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device)}
    return facts


@cache
def git_commit() -> str | None:
    """Commit of the checkout, or of the worktree, that qdm runs from; None = installed from a wheel."""
    git = Path(__file__).resolve().parents[3] / ".git"
    with suppress(OSError):
        shared = git
        if git.is_file():  # of a worktree: where its HEAD is, and from there where the branches are
            git = Path(git.read_text().removeprefix("gitdir: ").strip())
            shared = git / (git / "commondir").read_text().strip()
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        if (shared / name).is_file():
            return (shared / name).read_text().strip()
        for line in (shared / "packed-refs").read_text().splitlines():
            if line.endswith(" " + name):
                return line.split()[0]
    return None
