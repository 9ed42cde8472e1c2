"""What is written for AMX, AVX512-BF16 and AVX512-VNNI, in processes that emulate what this CPU has not of these."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulation import has_vnni

from qdm_kernels.native import build

ROOT = Path(__file__).resolve().parents[2]
TILES, ATTENTION, PRODUCERS = "test_native_tiles.py", "test_attention_native.py", "test_native_producers.py"
# Without what two threads would repeat, and without what would be skipped. Where AVX512 is emulated as well, the compiler takes most of the
# time: producers are compiled for one plugin. Outputs of 4,101 rows go past the caches, which the products in tiles know nothing of.
_PRODUCTS = "not onednn and not transformed and " + ("(not threads or small)" if has_vnni() else "small and not norm and not 4101")
_ATTENTION = "(tiles or vectors) and not torchs and (not threads or agree)"
_VNNI_ATTENTION = (
    "(shorts or floats or bytes or fixed_point or float32_serves or small_weights or large_weight) and not torchs and not threads"
)
_VNNI_PRODUCTS = "(small and not onednn and not transformed and not (4101 and weights)) or gelu_is or not_numbers or every_code"
_HERE = pytest.mark.skipif(has_vnni(), reason="AVX512-VNNI itself is here")
# Emulating all of AVX512 for attention takes a minute and a half.
_ALL = pytest.mark.skipif(not has_vnni() and os.environ.get("QDM_EMULATE_ALL") != "1", reason="QDM_EMULATE_ALL=1 runs it here")
CASES = [
    pytest.param("amx", (TILES,), _PRODUCTS, (), id="amx-products"),
    pytest.param("amx", (ATTENTION,), _ATTENTION, ("tiles", "vectors"), id="amx-attention", marks=_ALL),
    pytest.param("vnni", (TILES, PRODUCERS), _VNNI_PRODUCTS, (), id="vnni-products", marks=_HERE),
    pytest.param("vnni", (ATTENTION,), _VNNI_ATTENTION, ("shorts", "floats", "bytes"), id="vnni-attention", marks=(_HERE, _ALL)),
]

pytestmark = [
    pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not())),
    pytest.mark.skipif(not torch.cpu.get_capabilities().get("avx2"), reason="no AVX2 here"),
]


@pytest.mark.parametrize(("plugin", "files", "chosen", "kinds"), CASES)
def test_emulated(plugin: str, files: tuple[str, ...], chosen: str, kinds: tuple[str, ...]) -> None:
    env = {key: value for key, value in os.environ.items() if key != "ONEDNN_MAX_CPU_ISA"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", plugin, "-p", "no:cacheprovider", "-k", chosen]
    paths = [f"tests/kernels/{name}" for name in files]
    done = subprocess.run([*command, *paths], cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout.lower()
    assert all(f"[{kind}" in done.stdout or f"-{kind}" in done.stdout for kind in kinds)  # what does not compile is not there
