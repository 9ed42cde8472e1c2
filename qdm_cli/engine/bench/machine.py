"""What a machine is, and its ceilings: published for known GPUs, measured on a CPU."""

from __future__ import annotations

import os
import platform
import re
import time
from collections.abc import Callable
from typing import Any

import torch

from qdm_cli.engine.bench.roofline import PUBLISHED, Roof
from qdm_cli.engine.bench.timing import cpu_clock
from qdm_cli.engine.evaluation.cost import cpu_name
from qdm_cli.engine.run.host import git_commit, package_version, qdm_version
from qdm_kernels import backend, onednn
from qdm_kernels.attention.op import why_not_cpu

SCHEMA = 2
_INSTRUCTIONS = (
    ("amx_int8", "amx"),
    ("avx512_bf16", "avx512-bf16"),
    ("avx512_vnni", "avx512-vnni"),
)  # what decides a CPU's speed, best first
_PACKAGES = ("torch", "diffusers", "triton", "torchao", "openvino", "nncf")


def native_dtype(device: str) -> torch.dtype:
    """bf16 where the device multiplies it natively, else fp32: the honest float baseline."""
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.float32 if why_not_cpu() else torch.bfloat16


def device_name(device: str) -> str:
    """Name of the device, usable as a folder name; of a CPU with what it multiplies with: its model alone may hide that."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{cpu_name()} {_instructions()}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _instructions() -> str:
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return next((name for flag, name in _INSTRUCTIONS if flags.get(flag)), torch.backends.cpu.get_cpu_capability())


def describe(device: str) -> dict[str, Any]:
    """Machine, versions and settings of a report, without rows."""
    cuda = device.startswith("cuda")
    probe = backend.probe()
    return {
        "schema": SCHEMA,
        "device": device_name(device),
        "capability": list(torch.cuda.get_device_capability(device)) if cuda else torch.backends.cpu.get_cpu_capability(),
        "probe": None if cuda else {"linear": probe.linear.name, "conv2d": probe.conv2d.name, "fused_bias": probe.fused_bias},
        "baseline": str(native_dtype(device)).removeprefix("torch."),
        "threads": None if cuda else torch.get_num_threads(),
        "clock": "CUDA-graph replay, events" if cuda else f"{cpu_clock()[0]} time",
        "load_average": None if cuda else round(os.getloadavg()[0], 2),
        "versions": {name: version for name in _PACKAGES if (version := package_version(name))} | {"python": platform.python_version()},
        "cuda": torch.version.cuda if cuda else None,
        "qdm": qdm_version(),
        "git_commit": git_commit(),
        "rows": [],
    }


def roof_of(device: str) -> Roof:
    """Ceilings of a device; unknown ones of an unknown GPU are None."""
    if not device.startswith("cuda"):
        return _measured_roof()
    name = torch.cuda.get_device_name(device)
    return next((roof for key, roof in PUBLISHED.items() if key in name), Roof(None, None, None, "bfloat16", "unknown GPU"))


@torch.no_grad()
def _measured_roof() -> Roof:
    """Best of a large float product, a large int8 product on weights that fit the CPU, and a copy beyond the caches, on these threads."""
    dtype, rng = native_dtype("cpu"), torch.Generator().manual_seed(0)
    a, b = (torch.randn(1024, 1024, generator=rng).to(dtype) for _ in range(2))
    source = torch.randn(32 << 20, generator=rng)
    target = torch.empty_like(source)
    int8 = None
    if backend.probe().linear is not backend.Exact.NONE:
        x = torch.randint(0, 256, (1024, 1024), generator=rng, dtype=torch.uint8)
        packed = onednn.pack_linear(torch.randint(-64, 65, (1024, 1024), generator=rng, dtype=torch.int8))
        scale, zeros = torch.ones(1024), torch.zeros(1024, dtype=torch.int64)
        int8 = 2 * 1024**3 / _best_s(lambda: onednn.linear(x, 0, packed, scale, zeros))
    flops = 2 * 1024**3 / _best_s(lambda: a @ b)
    copied = 2 * source.nbytes / _best_s(lambda: target.copy_(source))
    return Roof(flops, int8, copied, str(dtype).removeprefix("torch."), "measured here: best of large products and of a copy")


def _best_s(call: Callable[[], Any], rounds: int = 7) -> float:
    clock, best = cpu_clock()[1], float("inf")
    for _ in range(rounds):
        started = clock()
        call()
        best = min(best, clock() - started)
    return best


def now() -> str:
    """UTC, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
