"""The fused producers without a GPU: codes against float64 on every backend, registered operators, one graph with the layers they feed."""

from __future__ import annotations

import pytest
import torch
from producers import check_codes, check_rows, gelu, group_norm, layer_norm
from torch import Tensor

from qdm_kernels.conv2d_w4a8 import op as conv4
from qdm_kernels.conv2d_w8a8 import op as conv8
from qdm_kernels.gelu_quantize.op import gelu_quantize, gelu_quantize_per_token
from qdm_kernels.group_norm_quantize.op import group_norm_quantize
from qdm_kernels.layer_norm_quantize.op import layer_norm_quantize, layer_norm_quantize_per_token

SCALES, ZEROS = torch.tensor([0.031, 0.02, 0.3]), torch.tensor([3, -100, 0], dtype=torch.int8)
STEP = torch.tensor([1], dtype=torch.int32)


def normal(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.fixture(params=["cpu", "reference"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QDM_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 72), (1, 3, 1), (3, 320), (2, 3, 2, 129), (0, 4, 16)], ids=str)
def test_layer_norm(backend: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    k = shape[-1]
    x, w, b, gains = normal(*shape, mean=2.0).to(dtype), normal(k, seed=1), normal(k, seed=2), 2 ** normal(3, k, seed=5)
    m, shift = normal(shape[0], k, seed=3).to(dtype), normal(shape[0], k, seed=4).to(dtype)
    exact = layer_norm(x, w, b, (m, shift), gains[1])
    keys = {"weight": w, "bias": b, "modulation": (m, shift), "gain": gains, "step": STEP}
    check_codes(layer_norm_quantize(x, SCALES, ZEROS, **keys), exact, SCALES[1], -100)
    check_rows(*layer_norm_quantize_per_token(x, **keys), exact)
    check_codes(layer_norm_quantize(x, SCALES[0], ZEROS[0], eps=1e-6), layer_norm(x, eps=1e-6), SCALES[0], 3)


@pytest.mark.parametrize("shape", [(2, 20, 5, 7), (1, 32, 1, 1), (1, 12, 20, 27), (0, 8, 4, 4)], ids=str)
def test_group_norm(backend: str, shape: tuple[int, ...]) -> None:
    x, w, b = normal(*shape, mean=1.5), normal(shape[1], seed=1), normal(shape[1], seed=2)
    gains = 2 ** normal(3, shape[1], seed=3)
    for activation in ("silu", "none"):
        codes = group_norm_quantize(x, 4, SCALES, ZEROS, weight=w, bias=b, activation=activation, gain=gains, step=STEP)
        check_codes(codes, group_norm(x, 4, w, b, gains[1], activation), SCALES[1], -100)
        assert codes.numel() == 0 or codes.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("gated", [False, True])
def test_gelu(backend: str, gated: bool, approximate: str) -> None:
    x, gain = normal(3, 5, 80 if gated else 40), 2 ** normal(40, seed=1)
    exact = gelu(x, gated, approximate, gain)
    check_codes(gelu_quantize(x, SCALES[0], ZEROS[0], gated=gated, approximate=approximate, gain=gain), exact, SCALES[0], 3)
    check_rows(*gelu_quantize_per_token(x, gated=gated, approximate=approximate, gain=gain), exact)


def test_a_gain_of_the_wrong_step_changes_the_codes() -> None:
    x, gains = normal(4, 40), 2 ** normal(3, 40, seed=1)
    assert not torch.equal(*(gelu_quantize(x, SCALES, ZEROS, gain=gains, step=torch.tensor([i], dtype=torch.int32)) for i in (0, 2)))


def test_opcheck() -> None:
    x, w, gains = normal(2, 3, 16), normal(16, seed=1), normal(3, 16, seed=2)
    modulation = [normal(2, 16, seed=3), normal(2, 16, seed=4)]
    ops, check = torch.ops.qdm, torch.library.opcheck
    check(ops.layer_norm_quantize.default, (x, w, w, modulation, gains, 1e-5, SCALES, ZEROS, STEP, 8))
    check(ops.layer_norm_quantize.default, (x, None, None, [], None, 1e-5, SCALES[:1], ZEROS[:1], None, 4))
    check(ops.layer_norm_quantize_per_token.default, (x, w, None, modulation, None, 1e-5, None, 8))
    image = normal(2, 16, 5, 4)
    check(ops.group_norm_quantize.default, (image, 4, w, w, gains, 1e-5, "silu", SCALES, ZEROS, STEP, 8))
    check(ops.gelu_quantize.default, (x, True, "none", gains[:, :8], SCALES, ZEROS, STEP, 8))
    check(ops.gelu_quantize_per_token.default, (x, False, "tanh", None, None, 8))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "extra",
    [
        {},
        {"activation": "silu", "residual": torch.ones(2, 20, 5, 4, dtype=torch.bfloat16), "out_dtype": torch.bfloat16},
        {"out_dtype": torch.int8, "out_scale": SCALES, "out_zero_point": ZEROS},
    ],
    ids=["plain", "residual", "int8"],
)
def test_opcheck_of_the_convolutions(draw, bits: int, extra: dict) -> None:
    op = {8: conv8, 4: conv4}[bits]
    w, zero = draw((20, 16, 3, 3), -8, 7), torch.zeros(20, dtype=torch.int32)
    layer = op.prepare(w, torch.rand(20) * 1e-3, zero, torch.randn(20), padding=(1, 1), backend="reference")
    x = draw((2, 16, 5, 4)).contiguous(memory_format=torch.channels_last)
    end = {"activation": "none", "residual": None, "out_dtype": torch.float32, "out_scale": None, "out_zero_point": None} | extra
    shape = list(conv8.output_shape(x, layer))
    args = (x, SCALES, ZEROS, layer.scale, layer.bias, layer.tensors, layer.how, shape, STEP, *end.values())
    torch.library.opcheck(getattr(torch.ops.qdm, layer.op).default, args)


def test_one_graph_from_norm_to_convolution(draw) -> None:
    """GroupNorm to codes, a convolution on them, its int8 output into the next one: no break, and the eager codes."""
    zero = torch.zeros(16, dtype=torch.int32)
    first = conv8.prepare(draw((16, 16, 3, 3), -8, 7), torch.full((16,), 1e-2), zero, torch.randn(16), padding=(1, 1))
    second = conv4.prepare(draw((16, 16, 1, 1), -8, 7), torch.full((16,), 1e-2), zero, None)
    w = normal(16, seed=1)

    def forward(x: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        codes = group_norm_quantize(x, 4, SCALES, ZEROS, weight=w, step=step)
        hidden = conv8.conv2d(codes, SCALES, ZEROS, first, step=step, out_dtype=torch.int8, out_scale=SCALES, out_zero_point=ZEROS)
        y = conv4.conv2d(hidden, SCALES, ZEROS, second, step=step, activation="silu", residual=x)
        return codes, layer_norm_quantize(gelu_quantize(y, SCALES[2], ZEROS[2]).float(), SCALES[1], ZEROS[2])

    x = normal(1, 16, 6, 4).contiguous(memory_format=torch.channels_last)
    got, want = torch.compile(forward, fullgraph=True)(x, STEP), forward(x, STEP)
    exact = group_norm(x, 4, w)
    check_codes(got[0], exact, SCALES[1], -100)
    # a code that lies on a tie may differ, and what it feeds with it
    assert (got[0] != want[0]).float().mean() < 0.01
    assert ((got[1].int() - want[1].int()).abs() > 2).float().mean() < 0.05


def test_padding_on_one_side(draw) -> None:
    """Downsampling as diffusers pads it: one row below, one column to the right, of real zeros."""
    w, x, zero = draw((8, 16, 3, 3), -8, 7), draw((2, 16, 7, 6)), torch.tensor(31)
    wide = torch.nn.functional.conv2d(torch.nn.functional.pad(x.double() - 31, (0, 1, 0, 1)), w.double(), stride=2)
    for op in (conv8, conv4):
        for backend in ("cpu", "reference"):
            keys = {"stride": (2, 2), "padding_end": (1, 1), "backend": backend}
            layer = op.prepare(w, torch.ones(8), torch.zeros(8, dtype=torch.int32), None, **keys)
            assert torch.equal(op.accumulate(x, zero, layer).double(), wide)
            assert torch.equal(op.conv2d(x, torch.tensor(1.0), zero, layer).double(), wide)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: layer_norm_quantize(x, SCALES, ZEROS), "a table with a step"),
        (lambda x: layer_norm_quantize(x, SCALES[0], SCALES[0]), "zero_point is an integer"),
        (lambda x: layer_norm_quantize(x.int(), SCALES[0], ZEROS[0]), "x is floating point"),
        (lambda x: layer_norm_quantize(x, SCALES[0], ZEROS[0], weight=torch.ones(3)), "one entry per channel"),
        (lambda x: layer_norm_quantize(x, SCALES[0], ZEROS[0], gain=torch.ones(3, 16)), r"\[S, 16\] with a step"),
        (lambda x: layer_norm_quantize(x, SCALES[0], ZEROS[0], modulation=(x[0], x[0])), r"modulation is \[B, K\]"),
        (lambda x: layer_norm_quantize(x, SCALES[0], ZEROS[0], bits=9), "bits must be 2..8"),
        (lambda x: layer_norm_quantize(x, SCALES, ZEROS, step=torch.tensor([1])), "step is one int32"),
        (lambda x: group_norm_quantize(x, 4, SCALES[0], ZEROS[0]), r"x is \[B, C, H, W\]"),
        (lambda x: group_norm_quantize(x[..., None], 2, SCALES[0], ZEROS[0], activation="gelu"), "silu or none"),
        (lambda x: gelu_quantize(x, SCALES[0], ZEROS[0], approximate="erf"), "none or tanh"),
        (lambda x: gelu_quantize(x[..., :15], SCALES[0], ZEROS[0], gated=True), "two halves"),
    ],
)
def test_errors(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(2, 4, 16))


def test_a_kernel_larger_than_its_padded_input_is_refused(draw) -> None:
    layer = conv8.prepare(draw((8, 16, 3, 3)), torch.ones(8), torch.zeros(8, dtype=torch.int32), None)
    with pytest.raises(ValueError, match="the kernel reaches over 3x3 pixels, the padded input has 2x5"):
        conv8.conv2d(draw((1, 16, 2, 5)), torch.tensor(1.0), torch.tensor(0), layer)
