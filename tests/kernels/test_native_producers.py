"""Producers in C++: codes against float64, the same bits for any number of threads, NaN and infinities, unwritten memory."""

from __future__ import annotations

import pytest
import torch
from producers import check_codes, check_rows, gelu, group_norm, layer_norm
from torch import Tensor

from qdm_kernels.gelu_quantize import cpu as gelu_cpu
from qdm_kernels.group_norm_quantize import cpu as group_cpu
from qdm_kernels.layer_norm_quantize import cpu as layer_cpu
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.native import build
from qdm_kernels.native import producers as native
from qdm_kernels.quantize import cpu as quantize_cpu
from qdm_kernels.quantize import reference

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))
GRID = native.Grid(1 / 0.03, -7)
SCALE, ZERO = torch.tensor(0.03), torch.tensor(-7, dtype=torch.int8)


def normal(*shape: int, seed: int = 0, mean: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + mean


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def threads(request: pytest.FixtureRequest):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def both_forms(make) -> Tensor:
    """Signed codes of `make(dtype)`, after a look at the shifted ones."""
    signed, shifted = make(torch.int8), make(torch.uint8)
    assert torch.equal(shifted.int() - 128, signed.int())
    return signed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 32, 7, 9), (1, 320, 40, 40), (2, 24, 1, 1), (1, 8, 3, 65), (1, 192, 13, 11), (0, 8, 4, 4)], ids=str)
def test_group_norm(threads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape, mean=30.0).to(dtype).contiguous(memory_format=torch.channels_last)
    c = shape[1]
    w, b, gain, shift = normal(c, seed=1), normal(c, seed=2), 2 ** normal(c, seed=3), normal(shape[0], c, seed=4)
    for activation in ("silu", "none"):
        codes = both_forms(lambda to: group_cpu.codes_of(x, 4, w, b, gain, 1e-5, activation, GRID, to, shift))  # noqa: B023
        exact = group_norm(x.double() + shift[:, :, None, None], 4, w, b, gain, activation)
        check_codes(codes, exact, SCALE, -7)
        plain = group_cpu.codes_of(x, 4, None, None, None, 1e-5, activation, GRID, torch.int8)
        check_codes(plain, group_norm(x, 4, activation=activation), SCALE, -7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 72), (1, 3, 1), (700, 320), (2, 3, 2, 129), (0, 4, 16), (3, 64)], ids=str)
def test_layer_norm(threads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, k = normal(*shape, mean=-20.0).to(dtype), shape[-1]
    w, b, gain = normal(k, seed=1), normal(k, seed=2), 2 ** normal(k, seed=5)
    m, shift = normal(shape[0], k, seed=3), normal(shape[0], k, seed=4)
    exact = layer_norm(x, w, b, (m, shift), gain)
    check_codes(both_forms(lambda to: layer_cpu.codes_of(x, w, b, [m, shift], gain, 1e-5, GRID, to)), exact, SCALE, -7, slack=5e-3)
    check_codes(layer_cpu.codes_of(x, None, None, [], None, 1e-6, GRID, torch.int8), layer_norm(x, eps=1e-6), SCALE, -7)
    check_rows(*layer_cpu.normalize_quantize(x, w, b, [m, shift], gain, 1e-5, None, None, None, 8), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("rows", [3, 900])
def test_gelu(threads: int, rows: int, gated: bool, approximate: str, dtype: torch.dtype) -> None:
    x, gain = (2 * normal(rows, 148 if gated else 74)).to(dtype), 2 ** normal(74, seed=1)
    exact = gelu(x, gated, approximate, gain)
    check_codes(both_forms(lambda to: gelu_cpu.codes_of(x, gated, approximate, gain, GRID, to)), exact, SCALE, -7)
    check_rows(*gelu_cpu.activate_quantize(x, gated, approximate, gain, None, None, None, 8), exact)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_right_everywhere(approximate: str) -> None:
    """At a scale that shows errors of 1e-6, on a fine line and far outside."""
    x = torch.cat([torch.linspace(-9, 9, 40_001), torch.tensor([-1e20, -1e4, -60.0, 0.0])]).reshape(-1, 1)
    exact = gelu(x, approximate=approximate)
    for part in range(-120, 121, 16):  # a window of 254 codes slides over the range of values
        low = part / 16
        inside = (exact > low) & (exact < low + 1)
        scale = 1 / 250
        codes = gelu_cpu.codes_of(x[inside].reshape(-1, 1), False, approximate, None, native.Grid(1 / scale, 0), torch.int8)
        want = (exact[inside] / scale).clamp(-128, 127)
        assert ((codes.flatten().double() - want).abs() <= 0.5 + 1e-6 / scale + 1e-4).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 5, 40), (2, 7), (1, 1), (900, 129)], ids=str)
def test_per_token_is_the_reference(threads: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = normal(*shape).to(dtype)
    x.view(-1, shape[-1])[0] = 0
    for bits in (8, 4):
        got, want = quantize_cpu.quantize_per_token(x, bits), reference.quantize_per_token(x, bits)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_rows_that_are_not_numbers() -> None:
    x = normal(4, 70)
    x[0, 3], x[1, 69], x[2, 0] = torch.nan, torch.inf, -torch.inf
    got, want = quantize_cpu.quantize_per_token(x, 8), reference.quantize_per_token(x, 8)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1].nan_to_num(-1), want[1].nan_to_num(-1))
    codes = layer_cpu.codes_of(x, None, None, [], None, 1e-5, GRID, torch.int8)
    assert (codes[:3] == GRID.zero_point).all()  # NaN becomes the code of zero
    assert len(codes[3].unique()) > 8
    gated = gelu_cpu.codes_of(torch.tensor([[torch.nan, 1e30, -1e30, 1.0, 1.0, 1.0]]), True, "none", None, GRID, torch.int8)
    assert gated.tolist() == [[-7, 127, -128]]


def test_the_number_of_threads_changes_no_bit() -> None:
    image = normal(2, 320, 33, 31, mean=3.0).contiguous(memory_format=torch.channels_last)
    rows = normal(900, 640)

    def codes() -> list[Tensor]:
        return [
            group_cpu.codes_of(image, 32, None, None, None, 1e-5, "silu", native.Grid(900.0, 0), torch.int8),
            layer_cpu.codes_of(rows, None, None, [], None, 1e-5, native.Grid(900.0, 0), torch.int8),
            gelu_cpu.codes_of(rows, True, "none", None, native.Grid(900.0, 0), torch.int8),
            *quantize_cpu.quantize_per_token(rows, 8),
        ]

    before, seen = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        seen.append(codes())
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in seen[1:] for a, b in zip(seen[0], other, strict=True))


def test_every_code_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory full of a code that no value has."""
    made = torch.empty

    def poisoned(*args, **kwargs) -> Tensor:
        out = made(*args, **kwargs)
        return out.fill_(99) if out.dtype in (torch.int8, torch.uint8) else out.fill_(torch.nan)

    monkeypatch.setattr(torch, "empty", poisoned)
    x = normal(37, 147)
    grid = native.Grid(10.0, 0)
    for codes in (
        layer_cpu.codes_of(x, None, None, [], None, 1e-5, grid, torch.int8),
        gelu_cpu.codes_of(x, False, "tanh", None, grid, torch.int8),
        quantize_cpu.quantize_for(x, SCALE, ZERO, 8, native.Grid(1.0, 0), torch.uint8).int() - 128,
    ):
        assert int(codes.max()) < 99
    scales = quantize_cpu.quantize_per_token(x, 8)[1]
    assert not scales.isnan().any()


def test_layers_take_shifted_codes_only_where_onednn_runs() -> None:
    weight, zero = torch.randint(-8, 8, (16, 64), dtype=torch.int8), torch.zeros(16, dtype=torch.int8)
    codes = torch.randint(-128, 128, (5, 64), dtype=torch.int8)
    layer = linear_op.prepare(weight, torch.rand(16), zero, None, backend="cpu")
    if layer.reads_unsigned:
        shifted = (codes.int() + 128).to(torch.uint8)
        assert torch.equal(linear_op.linear(shifted, SCALE, ZERO, layer), linear_op.linear(codes, SCALE, ZERO, layer))
    plain = linear_op.prepare(weight, torch.rand(16), zero, None, backend="reference")
    with pytest.raises(ValueError, match="int8"):
        linear_op.linear(codes.view(torch.uint8), SCALE, ZERO, plain)
