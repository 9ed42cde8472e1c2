"""Rivals compute the same layer; those that are not installed are left out without a word."""

import sys

import pytest
import torch
import torch.nn.functional as F

from qdm_cli.engine.bench.peers import peer_calls
from qdm_cli.engine.bench.shapes import parse_shapes

LINEAR, CONV = (parse_shapes(name)[0] for name in ("linear:32x64x48", "conv2d:1x16x8x24"))


def _case(shape):
    generator = torch.Generator().manual_seed(0)
    kernel = (shape.kernel, shape.kernel) if shape.op == "conv2d" else ()
    size = (shape.rows, shape.inputs) if shape.op == "linear" else (shape.batch, shape.inputs, shape.side, shape.side)
    x = torch.randn(size, generator=generator)
    weight = torch.randn((shape.outputs, shape.inputs, *kernel), generator=generator)
    return [x, x * 0.5], weight, torch.randn(shape.outputs, generator=generator)


def test_only_torchs_own_product_without_installed_rivals(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    inputs, weight, bias = _case(LINEAR)
    assert list(peer_calls(LINEAR, inputs, weight, bias, compiled=True)) == ["torch._int_mm, ready codes"]
    inputs, weight, bias = _case(CONV)
    assert peer_calls(CONV, inputs, weight, bias, compiled=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [LINEAR, CONV], ids=["linear", "conv2d"])
def test_installed_rivals_compute_the_layer(shape):
    pytest.importorskip("torchao")
    inputs, weight, bias = _case(shape)
    calls = peer_calls(shape, inputs, weight, bias, compiled=True)
    assert "X86 inductor int8" in calls
    calls.pop("torch._int_mm, ready codes", None)
    for call in calls.values():
        for index, x in enumerate(inputs):
            want = F.linear(x, weight, bias) if shape.op == "linear" else F.conv2d(x, weight, bias, padding=shape.kernel // 2)
            assert (call(index) - want).norm() / want.norm() < 0.05
