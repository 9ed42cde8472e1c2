"""Shapes against the model's own layers, and the expected times against those of the specification."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdm_cli.engine.bench.roofline import Roof, expected_h100_s, roofline_s
from qdm_cli.engine.bench.shapes import MODELS, capped, parse_shapes
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.published import CONFIGS, build_published


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ldm4", "dit256", "dit512"])
def test_every_shape_is_a_layer_of_the_published_model(name: str) -> None:
    with torch.device("meta"):
        denoiser = build_published(name)
    assert sum(p.numel() for p in denoiser.parameters()) == CONFIGS[name].parameters
    found = {("linear", m.in_features, m.out_features, 1) for m in denoiser.modules() if isinstance(m, nn.Linear)}
    found |= {("conv2d", m.in_channels, m.out_channels, m.kernel_size[0]) for m in denoiser.modules() if isinstance(m, nn.Conv2d)}
    for shape in MODELS[name]:
        key = (shape.op, shape.inputs, shape.outputs, shape.kernel)
        assert key in found or "fused" in shape.layer or shape.layer == "GEGLU proj", shape


@pytest.mark.parametrize(
    ("text", "bf16_us", "w8a8_us"),
    [
        ("linear:4608x12288x3072", 480, 311),
        ("linear:2048x10240x1280", 84, 55),
        ("linear:2048x1280x1280", 13, 9.3),
        ("linear:8192x2560x320", 33, 22),
        ("linear:8192x320x320", 6.4, 5.2),
        ("conv2d:2x320x64x320", 24, 16),
        ("conv2d:2x640x32x640", 24, 16),
        ("conv2d:2x1280x32x1280", 83, 54),
    ],
)
def test_expected_times_are_those_of_the_specification(text: str, bf16_us: float, w8a8_us: float) -> None:
    (shape,) = parse_shapes(text)
    assert expected_h100_s(shape, "bf16") * 1e6 == pytest.approx(bf16_us, rel=0.03)
    assert expected_h100_s(shape, "w8a8") * 1e6 == pytest.approx(w8a8_us, rel=0.03)


def test_the_roofline_is_the_slower_of_arithmetic_and_memory() -> None:
    roof = Roof(1e12, 2e12, 1e11, "float32", "test")
    (wide,), (thin,) = parse_shapes("linear:1024x1024x1024"), parse_shapes("linear:1x1024x1024")
    assert roofline_s(wide, roof, None, 4) == pytest.approx(2 * 1024**3 / 1e12)
    assert roofline_s(wide, roof, 8, 4) == pytest.approx(2 * 1024**3 / 2e12)
    assert roofline_s(thin, roof, 4, 4) == pytest.approx((1024 * 1024 / 2 + 1024 * 5) / 1e11)
    assert roofline_s(thin, Roof(None, None, None, "float32", "unknown"), 4, 4) is None


def test_own_shapes_and_refusals() -> None:
    (conv,) = parse_shapes("conv2d:2x64x8x32k1s2")
    assert (conv.rows, conv.inputs, conv.outputs, conv.kernel, conv.stride, conv.batch) == (128, 64, 32, 1, 2, 2)
    assert len(parse_shapes("all")) == sum(len(shapes) for shapes in MODELS.values())
    for text in ("sd16", "linear:0x4x4", "linear:4x4", "conv2d:1x8x8x8k2", "conv2d:1x8x8x8s0"):
        with pytest.raises(InputError, match=text):
            parse_shapes(text)


def test_capping_keeps_everything_but_the_rows() -> None:
    (linear,), (conv,) = parse_shapes("linear:8192x2560x320"), parse_shapes("conv2d:2x320x64x320")
    for shape in (linear, conv):
        small = capped(shape, 100_000_000)
        assert small.macs <= 100_000_000
        assert (small.inputs, small.outputs, small.kernel, small.capped_from) == (shape.inputs, shape.outputs, shape.kernel, shape.rows)
        assert small.rows == small.batch * (small.side**2 if small.side else 1)
        assert capped(shape, None) is shape
    assert capped(linear, 1).rows == 1
