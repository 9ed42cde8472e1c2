"""Freed memory of CPU denoisers: what glibc is told, and when."""

from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys

import pytest
import torch

from qdm_cli.engine.bench.denoisers import quantized_state
from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.runtime import tune
from qdm_cli.engine.runtime.memory import keep_freed_memory
from qdm_cli.engine.runtime.modules import pack_denoiser_

# Eight outputs of 16 MB, freed together, five times over: 160,000 pages of 4 KB if all of them are taken anew. glibc begins with blocks
# that it gives back at once, whatever it has seen. It is told once and for all, therefore in a process of its own.
FAULTS = """
import ctypes, resource, torch
ctypes.CDLL(None).mallopt(-3, 128 << 10)
from qdm_cli.engine.runtime.memory import keep_freed_memory
def layer(): return [torch.empty(4 << 20).fill_(1.0) for _ in range(8)]
def faults():
    for _ in range(3): layer()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5): layer()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
anew = faults()
print(anew, keep_freed_memory(), faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")
def test_pages_stay() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_", "QDM_KEEP"))}
    done = subprocess.run([sys.executable, "-c", FAULTS], env=env, capture_output=True, text=True, check=True)
    anew, told, kept = done.stdout.split()
    assert told == "None"
    assert int(kept) < 1000
    assert int(anew) > 100_000 * 4096 // resource.getpagesize() // 2


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [("QDM_KEEP_MEMORY", "0", "QDM_KEEP_MEMORY=0"), ("MALLOC_TRIM_THRESHOLD_", "1000000", "MALLOC_TRIM_THRESHOLD_ is set")],
)
def test_whoever_decides_otherwise_is_obeyed(name: str, value: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    assert keep_freed_memory.__wrapped__() == why


def test_auto_alone_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(tune, "keep_freed_memory", lambda: told.append(1))
    denoiser = tiny_denoiser("sd").eval().requires_grad_(False)
    with torch.no_grad():
        state = quantized_state(denoiser, example_inputs(denoiser, CallShape(1, 1, (8, 8)), "cpu"), 8)
    pack_denoiser_(denoiser, state, mode="exact")
    assert not told
    tune.tune_(denoiser, "auto")
    assert told == [1]
