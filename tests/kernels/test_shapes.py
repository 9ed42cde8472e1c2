"""Every CPU backend on 200 random odd shapes per op: sums equal float64 truth. The GPU and the interpreter run the same property."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from shapes import conv_cases, linear_cases

from qdm_kernels.conv2d_w4a8 import op as conv4
from qdm_kernels.conv2d_w8a8 import op as conv8
from qdm_kernels.linear_w4a8 import op as linear4
from qdm_kernels.linear_w8a8 import op as linear8

COUNT = 200
LINEAR, CONV = {8: linear8, 4: linear4}, {8: conv8, 4: conv4}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits", [8, 4])
def test_linear(bits: int, backend: str) -> None:
    for case in linear_cases(COUNT, bits):
        x, w, z_w = case.draw()
        layer = LINEAR[bits].prepare(w, torch.ones(len(w)), z_w, None, backend=backend)
        assert torch.equal(linear8.accumulate(x, torch.tensor(case.z_x), layer), case.truth(x, w, z_w)), case


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("bits", [8, 4])
def test_convolution(bits: int, backend: str) -> None:
    for case in conv_cases(COUNT, bits, largest=40, channels=(3, 16, 17, 64)):
        x, w, z_w = case.draw()
        g = case.geometry
        keys = {"stride": g.stride, "padding": g.padding, "dilation": g.dilation, "padding_end": g.padding_end}
        layer = CONV[bits].prepare(w, torch.ones(len(w)), z_w, None, **keys, backend=backend)
        assert torch.equal(conv8.accumulate(x, torch.tensor(case.z_x), layer), case.truth(x, w, z_w)), case


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("shape", [(6, 70), (2, 64, 5, 7)], ids=["linear", "conv2d"])
def test_two_ranges_are_two_layers_and_a_residual(shape: tuple[int, ...], backend: str) -> None:
    """A layer over a concatenation whose halves have scales of their own, y = op(x_1) + (op(x_2) + bias): the sum's very bits."""
    op: Any = linear8 if len(shape) == 2 else conv8
    run = op.linear if len(shape) == 2 else op.conv2d
    rng = torch.Generator().manual_seed(0)
    x = [torch.randint(-128, 128, shape, generator=rng, dtype=torch.int8) for _ in range(2)]
    taps = (1, 1) if len(shape) == 4 else ()
    codes = [torch.randint(-64, 64, (9, shape[1], *taps), generator=rng, dtype=torch.int8) for _ in range(2)]
    zero, bias = torch.zeros(9, dtype=torch.int32), torch.randn(9, generator=rng)
    layers = [
        op.prepare(c, torch.rand(9, generator=rng) * 1e-2, zero, b, backend=backend) for c, b in zip(codes, (None, bias), strict=True)
    ]
    args = [(x[0], torch.tensor(0.02), torch.tensor(3), layers[0]), (x[1], torch.tensor(0.5), torch.tensor(-7), layers[1])]
    second = run(*args[1])
    assert torch.equal(run(*args[0], residual=second), run(*args[0]) + second)
    half = run(*args[0], residual=second, out_dtype=torch.bfloat16)
    assert torch.equal(half, (run(*args[0]) + second).bfloat16())


@pytest.mark.parametrize("op", [linear8, conv8])
def test_tensors_on_another_device_are_refused(op: Any) -> None:
    shape = (4, 8) if op is linear8 else (4, 8, 1, 1)
    layer = op.prepare(torch.ones(shape, dtype=torch.int8), torch.ones(4), torch.zeros(4, dtype=torch.int32), None, backend="reference")
    run = op.linear if op is linear8 else op.conv2d
    x = torch.zeros((2, 8) if op is linear8 else (2, 8, 3, 3), dtype=torch.int8)
    with pytest.raises(ValueError, match="x_codes is on meta, the layer on cpu"):
        run(x.to("meta"), torch.tensor(1.0), torch.tensor(0), layer)
    out = run(x, torch.tensor(1.0), torch.tensor(0), layer)
    with pytest.raises(ValueError, match="residual is on meta"):
        run(x, torch.tensor(1.0), torch.tensor(0), layer, residual=out.to("meta"))
