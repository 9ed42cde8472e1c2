"""The loops on AMX tiles and AVX512-BF16 in a process that emulates both, for hosts that have neither; compiled as everywhere else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qdm_kernels.native import build

ROOT = Path(__file__).resolve().parents[2]
CASES = {  # without what two threads would repeat
    "test_native_tiles.py": "not onednn and (not threads or small)",
    "test_attention_native.py": "(tiles or vectors) and not torchs and (not threads or agree)",
}

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx512_bw"), reason="no AVX512 here"),
]


@pytest.mark.parametrize("name", CASES)
def test_emulated(name: str) -> None:
    env = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "amx", "-p", "no:cacheprovider", "-k", CASES[name]]
    done = subprocess.run(
        [*command, f"tests/kernels/{name}"], cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
