"""Freed memory of CPU denoisers: what glibc is told, in processes of its own, since it is told once and for all."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="not glibc")

# Eight outputs of 16 MB, freed together, ten times over: 160,000 pages of 4 KB if all of them are taken anew.
FAULTS = """
import resource, sys, torch
from qdm_cli.engine.runtime.memory import keep_freed_memory
told = keep_freed_memory() if sys.argv[1] == "keep" else "not asked"
def layer(): return [torch.empty(4 << 20).fill_(1.0) for _ in range(8)]
for _ in range(3): layer()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5): layer()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, told)
"""
PACKED = """
import torch
from qdm_cli.engine.models.tiny import tiny_denoiser
from qdm_cli.engine.runtime import memory, tune
told = []
tune.keep_freed_memory = lambda: told.append(1)
from qdm_kernels.layout import LAYOUT_VERSION
from qdm_cli.engine.bench.denoisers import quantized_state
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
denoiser = tiny_denoiser("sd").eval().requires_grad_(False)
state = quantized_state(denoiser, example_inputs(denoiser, CallShape(1, 1, (8, 8)), "cpu"), 8)
pack_denoiser_(denoiser, state, mode="exact")
exact = len(told)
tune.tune_(denoiser, "auto")
print(exact, len(told))
"""


def run(code: str, *args: str, **settings: str) -> str:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code, *args], env=ours | settings, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_pages_stay() -> None:
    kept, told = run(FAULTS, "keep").split(maxsplit=1)
    anew, _ = run(FAULTS, "leave").split(maxsplit=1)
    assert told == "None"
    assert int(kept) < 1000 < int(anew)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"QDM_KEEP_MEMORY": "0"}, "QDM_KEEP_MEMORY=0"), ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, "MALLOC_TRIM_THRESHOLD_ is set")],
    ids=str,
)
def test_whoever_decides_otherwise_is_obeyed(settings: dict[str, str], why: str) -> None:
    faults, told = run(FAULTS, "keep", **settings).split(maxsplit=1)
    assert told == why
    assert int(faults) > 1000


def test_only_auto_asks_for_it() -> None:
    assert run(PACKED) == "0 1"
