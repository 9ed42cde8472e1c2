"""The chooser, its reasons, and the probe."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from qdm_kernels import backend, exact, onednn
from qdm_kernels.backend import Exact
from qdm_kernels.linear_w8a8 import op as linear_op


@pytest.mark.parametrize("op", backend.OPS)
def test_cpu_is_chosen_and_the_environment_overrides(op: str, monkeypatch: pytest.MonkeyPatch, probe_as) -> None:
    probe_as(Exact.FULL)
    assert backend.choose(op) == "cpu"
    monkeypatch.setenv("QDM_BACKEND", "reference")
    assert backend.choose(op) == "reference"
    assert backend.choose(op, backend="cpu") == "cpu"
    monkeypatch.setenv("QDM_BACKEND", "cuda")
    with pytest.raises(ValueError, match="unknown backend; one of triton, cpu, reference"):
        backend.choose(op)


def test_every_refusal_has_a_reason(probe_as) -> None:
    probe_as(Exact.SMALL)
    assert backend.why_not("onednn", "linear_w8a8", weight_range=(-64, 64)) is None
    saturates = "oneDNN int8 saturates on this CPU (no VNNI) and weights exceed 64"
    assert backend.why_not("onednn", "linear_w8a8", weight_range=(-65, 0)) == saturates
    assert backend.why_not("onednn", "conv2d_w8a8", weight_range=(0, 65)) == saturates
    assert "the tensors are on cuda" in (backend.why_not("cpu", "linear_w8a8", device="cuda") or "")
    probe_as(Exact.FULL)
    assert backend.why_not("onednn", "linear_w8a8", weight_range=(-128, 127)) is None
    assert "exceed int8" in (backend.why_not("onednn", "linear_w8a8", weight_range=(-128, 128)) or "")
    probe_as(Exact.NONE)
    assert "missing or inexact" in (backend.why_not("onednn", "conv2d_w8a8", weight_range=(0, 0)) or "")
    with pytest.raises(ValueError, match="unknown op"):
        backend.why_not("cpu", "linear_w2a2")


def test_reference_takes_over_where_float32_is_inexact(probe_as) -> None:
    probe_as(Exact.NONE, fp32=False)
    assert backend.choose("conv2d_w8a8") == "reference"
    assert backend.choose("linear_w8a8", device="meta") == "reference"


def test_probe_finds_something_and_runs_once() -> None:
    assert backend.probe() is backend.probe()
    assert backend.probe().fp32


def saturating(x, zero_point, packed, scale, zeros):
    """A machine without VNNI: neighbouring products meet in int16."""
    pairs = (x.long()[:, None, :] * packed.long()[None]).unflatten(-1, (-1, 2)).sum(-1).clamp(-(2**15), 2**15 - 1)
    return (pairs.sum(-1) - zero_point * packed.long().sum(1)).float() * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["two roundings", "fused multiply-add", "truncated", "missing"])
def test_an_epilogue_is_fused_only_where_it_rounds_like_the_contract(way: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(sums, scale, bias, out_dtype):
        if way == "missing":
            raise RuntimeError("no such output")
        y = (sums.double() * scale.double() + bias.double()).float() if way == "fused multiply-add" else sums.float() * scale + bias
        cut = y.view(torch.int32).bitwise_and(-(1 << 16)).view(torch.float32)
        return (cut if way == "truncated" else y).to(out_dtype)

    monkeypatch.setattr(onednn, "pack_linear", lambda codes: codes)
    monkeypatch.setattr(onednn, "linear", lambda x, z, w, s, zeros, *, bias, out_dtype: add(x.long() @ w.long().T, s, bias, out_dtype))
    monkeypatch.setattr(onednn, "pack_conv2d", lambda codes, geometry: codes.flatten(1))
    conv = lambda x, z, w, s, zeros, g, *, bias, out_dtype: add(x.flatten(1).long() @ w.long().T, s, bias, out_dtype)  # noqa: E731
    monkeypatch.setattr(onednn, "conv2d", conv)
    # a last bit of float32 rarely survives the rounding to bf16
    allowed = {"two roundings"} | ({"fused multiply-add"} if dtype == torch.bfloat16 else set())
    assert backend._epilogue_is_exact(dtype) == (way in allowed)


@pytest.mark.parametrize("way", ["exact", "saturating", "off by one", "two roundings", "missing"])
def test_probe_tells_machines_apart(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def product(x, zero_point, packed, scale, zeros, *, bias=None, out_dtype=torch.float32):
        if way == "missing":
            raise RuntimeError("no such operator")
        if way == "saturating":
            return saturating(x, zero_point, packed, scale, zeros)
        sums = (x.long() - zero_point) @ packed.long().T + (way == "off by one")
        y = sums.float() * (scale / 3) * 3 if way == "two roundings" else sums.float() * scale
        return (y if bias is None else y + bias).to(out_dtype)

    monkeypatch.setattr(onednn, "pack_linear", lambda codes: codes)
    monkeypatch.setattr(onednn, "linear", product)
    want = {"exact": Exact.FULL, "saturating": Exact.SMALL}.get(way, Exact.NONE)
    assert backend.probe.__wrapped__().linear is want


def test_importing_runs_nothing() -> None:
    """No probe, no operator, no environment at import."""
    code = "import qdm_kernels.linear_w8a8.op, qdm_kernels.conv2d_w8a8.op, qdm_kernels.quantize.op as q; from qdm_kernels import backend; "
    code += "assert backend.probe.cache_info().misses == 0"
    subprocess.run([sys.executable, "-c", code], check=True, env=_env(QDM_BACKEND="nonsense"))


CAPPED = """
import torch
from qdm_kernels import backend
from qdm_kernels.linear_w8a8 import op as L
from qdm_kernels.conv2d_w8a8 import op as C
torch.set_num_threads(1)
rng = torch.Generator().manual_seed(0)
draw = lambda *shape: torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8)
z = torch.tensor(17)
for limit in (8, 64, 128):
    w, wz = draw(40, 72, 3, 3).clamp(-limit, limit - 1), torch.zeros(40, dtype=torch.int32)
    one = torch.ones(40)
    for op, weight, x in ((L, w.flatten(1), draw(9, 648)), (C, w, draw(2, 72, 7, 7))):
        keys = {"padding": (1, 1)} if op is C else {}
        a, b = (op.prepare(weight, one, wz, None, backend=name, **keys) for name in ("cpu", "reference"))
        assert torch.equal(op.accumulate(x, z, a), op.accumulate(x, z, b)), (limit, op.__name__, a.strategy, backend.probe())
"""


@pytest.mark.parametrize("cap", ["SSE41", "AVX2", "AVX512_CORE"])
def test_capped_instruction_sets_stay_exact(cap: str) -> None:
    """CPU flags do not show the cap; the probe does. Without it int8 saturates silently (kernels.md 9.2)."""
    subprocess.run([sys.executable, "-c", CAPPED], check=True, env=_env(ONEDNN_MAX_CPU_ISA=cap))


def _env(**extra: str) -> dict[str, str]:
    root = Path(__file__).resolve().parents[2] / "kernels"
    return {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", **extra}


def test_split_is_exact_and_minimal() -> None:
    l1 = torch.full((3, 1000), 127)
    slices = exact.split_exact(l1, 255)
    assert slices[0][0] == 0
    assert slices[-1][1] == 1000
    assert all(b == c for (_, b), (c, _) in pairwise(slices))
    assert all((b - a) * 127 * 255 <= 2**24 for a, b in slices)
    assert len(slices) == 2
    assert exact.split_exact(l1, 128) == ((0, 1000),)


def test_split_refuses_a_single_input_past_the_bound() -> None:
    with pytest.raises(ValueError, match="backend='reference'"):
        exact.split_exact(torch.full((1, 2), 70000), 255)


def test_int32_overflow_is_refused() -> None:
    codes = torch.full((1, 70000), -128, dtype=torch.int8)
    with pytest.raises(ValueError, match="past int32"):
        linear_op.prepare(codes, torch.ones(1), torch.zeros(1, dtype=torch.int32), None)
