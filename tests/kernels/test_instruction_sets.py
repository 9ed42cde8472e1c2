"""The CPU's backends have the reference's bits whatever instruction sets the compiler and oneDNN are held to."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from qdm_kernels.native import build
from qdm_kernels.native.tiles import STRATEGIES

_CODE = """
import torch
from qdm_kernels.conv2d_w8a8 import op as conv
from qdm_kernels.linear_w8a8 import op as linear
from qdm_kernels.native import attention, build
from qdm_kernels.quantize import reference
from qdm_kernels.quantize.op import quantize
torch.manual_seed(0)
scale, z, zero, bias = torch.tensor(0.03), torch.tensor(-5), torch.zeros(40, dtype=torch.int32), torch.randn(40)
seen = []
for op, call, x, shape, keys in (
    (linear, linear.linear, torch.randn(70, 192), (40, 192), {}),
    (conv, conv.conv2d, torch.randn(2, 64, 9, 11).to(memory_format=torch.channels_last), (40, 64, 3, 3), {"padding": (1, 1)}),
):
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    codes = quantize(x, scale, z, 8)
    assert torch.equal(codes, reference.quantize(x, scale, z, 8))
    scales = torch.rand(40)
    a, b = (op.prepare(weight, scales, zero, bias, backend=name, **keys) for name in ("cpu", "reference"))
    assert torch.equal(op.accumulate(codes, z, a), op.accumulate(codes, z, b))
    assert torch.equal(call(codes, scale, z, a), call(codes, scale, z, b))
    seen.append(a.strategy)
assert build.library("producers") is not None
print(*seen, attention.products().name)
"""


def has(flag: str) -> bool:
    return bool(torch.cpu.get_capabilities().get(flag))


@pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
@pytest.mark.parametrize(
    ("architecture", "cap", "needs", "tiled"),
    [
        ("x86-64-v3", "AVX2", "avx2", True),
        ("skylake-avx512", "AVX512_CORE", "avx512_bw", False),
        ("cascadelake", "AVX512_CORE_VNNI", "avx512_vnni", True),
        ("native", "", "avx2", None),
    ],
)
def test_the_same_bits(architecture: str, cap: str, needs: str, tiled: bool | None) -> None:
    if not has(needs):
        pytest.skip(f"this CPU has no {needs}")
    environment = os.environ | {"QDM_NATIVE_ARCH": architecture}
    environment.pop("ONEDNN_MAX_CPU_ISA", None)
    environment |= {"ONEDNN_MAX_CPU_ISA": cap} if cap else {}
    done = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linear, conv, attention = done.stdout.split()
    assert tiled is None or (linear in STRATEGIES, conv in STRATEGIES) == (tiled, tiled)
    assert attention == {"x86-64-v3": "NARROW", "skylake-avx512": "FLOATS", "cascadelake": "SHORTS"}.get(architecture, attention)
