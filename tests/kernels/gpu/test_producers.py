"""Quantizers, fused producers and weight-only layers on a real GPU, against float64."""

from __future__ import annotations

import random

import producers as oracle
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from qdm_kernels.gelu_quantize.op import gelu_quantize, gelu_quantize_per_token
from qdm_kernels.group_norm_quantize.op import group_norm_quantize
from qdm_kernels.layer_norm_quantize.op import layer_norm_quantize, layer_norm_quantize_per_token
from qdm_kernels.linear_w4a16 import op as weight_only
from qdm_kernels.linear_w8a16 import op as weight_only8
from qdm_kernels.quantize import reference
from qdm_kernels.quantize.op import quantize, quantize_per_token

pytestmark = pytest.mark.gpu
GPU = "cuda"
SCALES = torch.tensor([0.0317, 0.09, 0.2])
ZEROS = torch.tensor([0, -3, 40], dtype=torch.int32)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
COUNT = 200


def step(row: int) -> Tensor:
    return torch.tensor([row], dtype=torch.int32, device=GPU)


def floats(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(GPU, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantizers_on_random_shapes(dtype: torch.dtype) -> None:
    """Codes equal the contract's, ties included: inputs are multiples of half a step."""
    rng = random.Random(1)
    scales, zeros = SCALES.to(GPU), ZEROS.to(GPU)
    for i in range(COUNT):
        m, k, bits, row = rng.randint(1, 70), rng.choice([1, 320, 1153, 9000]), 4 if dtype == torch.float16 else 8, i % 3
        x = (torch.round(floats(m, k, seed=i, size=90)) * 0.5 * float(SCALES[row])).to(dtype)
        zero = zeros if bits == 8 else zeros.clamp(-8, 7)
        want = reference.quantize(x.float().cpu(), SCALES[row], zero[row].cpu(), bits)
        assert torch.equal(quantize(x, scales, zero, bits, step(row)).cpu(), want), (m, k, bits)
        codes, scale = quantize_per_token(x, bits)
        wanted_codes, wanted_scale = reference.quantize_per_token(x.cpu(), bits)
        assert torch.equal(scale.cpu(), wanted_scale), (m, k, bits)
        assert torch.equal(codes.cpu(), wanted_codes), (m, k, bits)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_layer_norms_on_random_shapes(dtype: torch.dtype) -> None:
    rng = random.Random(2)
    for i in range(COUNT // 3):
        b, t, k = rng.randint(1, 4), rng.randint(1, 40), rng.choice([7, 320, 1152, 3001])
        x = floats(b, t, k, seed=i, dtype=dtype) + i % 5
        weight, bias, gain = floats(k, seed=1, dtype=dtype), floats(k, seed=2, dtype=dtype), floats(3, k, seed=3).abs() + 0.5
        modulation = (floats(b, k, seed=4, dtype=dtype), floats(b, k, seed=5, dtype=dtype)) if i % 2 else None
        row = i % 3
        exact = oracle.layer_norm(x, weight, bias, modulation, gain[row])
        keys = {"weight": weight, "bias": bias, "modulation": modulation, "gain": gain, "step": step(row)}
        got = layer_norm_quantize(x, SCALES.to(GPU) * 0.3, ZEROS.to(GPU), **keys)
        oracle.check_codes(got, exact, SCALES[row].to(GPU) * 0.3, int(ZEROS[row]))
        oracle.check_rows(*layer_norm_quantize_per_token(x, **keys), exact)


@pytest.mark.parametrize(("samples", "rows", "k"), [(1, 4608, 3072), (2, 2500, 1280), (3, 4001, 320), (5, 1200, 1152)])
def test_layer_norms_of_many_rows_per_program(samples: int, rows: int, k: int) -> None:
    """Where a program goes through several rows, none is left out, written twice or modulated as another sample's."""
    x, m = floats(samples, rows, k, dtype=torch.bfloat16), floats(samples, k, seed=1, dtype=torch.bfloat16)
    shift, scale, zero = floats(samples, k, seed=2, dtype=torch.bfloat16), SCALES[:1].to(GPU), ZEROS[:1].to(GPU)
    exact = oracle.layer_norm(x, modulation=(m, shift))
    oracle.check_codes(layer_norm_quantize(x, scale, zero, modulation=(m, shift)), exact, scale)
    oracle.check_rows(*layer_norm_quantize_per_token(x, modulation=(m, shift)), exact)


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_group_norms_on_random_shapes(dtype: torch.dtype) -> None:
    rng = random.Random(3)
    for i in range(COUNT // 3):
        groups = rng.choice([4, 32])
        b, c, h, w = rng.randint(1, 3), groups * (10 if groups == 32 else 3), rng.choice([1, 5, 16, 33]), rng.choice([1, 7, 32])
        x = floats(b, c, h, w, seed=i, dtype=dtype) + i % 5
        x = x.contiguous(memory_format=torch.channels_last) if i % 2 else x
        weight, bias = floats(c, seed=1, dtype=dtype), floats(c, seed=2, dtype=dtype)
        activation, row = ("silu", "none")[i % 2], i % 3
        exact = oracle.group_norm(x, groups, weight, bias, None, activation)
        got = group_norm_quantize(
            x, groups, SCALES.to(GPU) * 0.3, ZEROS.to(GPU), weight=weight, bias=bias, activation=activation, step=step(row)
        )
        assert got.is_contiguous(memory_format=torch.channels_last)
        oracle.check_codes(got, exact, SCALES[row].to(GPU) * 0.3, int(ZEROS[row]))


@pytest.mark.parametrize("dtype", DTYPES[::2], ids=str)
def test_gelus_on_random_shapes(dtype: torch.dtype) -> None:
    rng = random.Random(4)
    for i in range(COUNT // 3):
        rows, k, row = rng.randint(1, 60), rng.choice([1, 64, 1999]), i % 3
        gated, approximate = i % 2 == 1, ("none", "tanh")[i % 2]
        x = floats(2, rows, k * (1 + gated), seed=i, dtype=dtype)
        exact = oracle.gelu(x, gated, approximate)
        got = gelu_quantize(x, SCALES.to(GPU) * 0.3, ZEROS.to(GPU), gated=gated, approximate=approximate, step=step(row))
        oracle.check_codes(got, exact, SCALES[row].to(GPU) * 0.3, int(ZEROS[row]))
        oracle.check_rows(*gelu_quantize_per_token(x, gated=gated, approximate=approximate), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_heads_of_queries_and_keys_on_random_shapes(dtype: torch.dtype) -> None:
    rng = random.Random(6)
    for i in range(COUNT // 3):
        tokens, at, rest = rng.randint(1, 70), rng.choice([0, 1, 16, 77]), rng.choice([0, 0, 5])
        heads, width = rng.choice([1, 2, 10, 24]), rng.choice([2, 64, 96, 128, 320])
        how = {"batch": rng.randint(1, 3), "weighted": i % 3 > 0, "values": i % 2 > 0, "joint": i % 5 > 0}
        oracle.check_heads(tokens, at, at + tokens + rest, heads, width, dtype, GPU, **how)


@pytest.mark.parametrize(
    ("groups", "dtype"), [(0, torch.bfloat16), (0, torch.float16), (64, torch.bfloat16), (128, torch.float16)], ids=str
)
def test_weight_only_layers_on_random_shapes(groups: int, dtype: torch.dtype) -> None:
    """Within the rounding of float32 sums and of the output."""
    rng = random.Random(5)
    for i in range(COUNT // 4):
        m, n = rng.choice([1, 2, 8, 33, 200]), rng.choice([1, 33, 130])
        k = groups * rng.choice([1, 2, 5]) if groups else rng.choice([1, 63, 192, 320, 1153])
        codes = torch.randint(-8, 8, (n, k), generator=torch.Generator().manual_seed(i), dtype=torch.int8).to(GPU)
        scale, bias = floats(n, *([k // groups] if groups else []), seed=1).abs() * 0.01 + 1e-3, floats(n, seed=2)
        zero = torch.full(scale.shape, i % 5 - 2, dtype=torch.int32, device=GPU)
        x = floats(m, k, seed=i, dtype=dtype)
        got = weight_only.linear(x, weight_only.prepare(codes, scale, zero, bias, backend="triton"))
        wide = weight_only.linear(x, weight_only8.prepare(codes, scale, zero, bias, backend="triton"))
        assert (
            torch.equal(wide, got) or ((wide.double() - got.double()).abs() <= torch.finfo(dtype).eps * 2 * got.double().abs() + 1e-4).all()
        )
        weight = (codes.double().unflatten(1, (-1, groups or k)) - (i % 5 - 2)) * scale.double().reshape(n, -1, 1)
        want = x.double() @ weight.flatten(1).T + bias.double()
        size = x.double().abs() @ weight.flatten(1).abs().T + bias.abs().double()
        assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-5 * size).all(), (m, n, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("bits", "groups"), [(4, 0), (8, 0), (4, 64), (4, 128), (8, 64), (8, 128)])
def test_layers_of_few_rows(bits: int, groups: int, dtype: torch.dtype) -> None:
    """Every code and zero point, any number of rows and outputs; a row does not depend on its neighbours."""
    op, low, rng = weight_only if bits == 4 else weight_only8, -(1 << bits - 1), random.Random(6)
    for i in range(COUNT // 5):
        m, n = rng.choice([1, 2, 7, 8, 9, 16, 40]), rng.choice([1, 15, 33, 130, 2304])
        k = groups * rng.choice([1, 2, 5]) if groups else rng.choice([1, 63, 192, 320, 1152, 1153, 3072])
        generator = torch.Generator().manual_seed(i)
        codes = torch.randint(low, -low, (n, k), generator=generator, dtype=torch.int8).to(GPU)
        scale, bias = floats(n, *([k // groups] if groups else []), seed=1).abs() * 0.01 + 1e-3, floats(n, seed=2)
        zero = torch.randint(low, -low, scale.shape, generator=generator, dtype=torch.int32).to(GPU)
        x, residual = floats(m, k, seed=i, dtype=dtype), floats(m, n, seed=i + 1, dtype=dtype)
        layer = op.prepare(codes, scale, zero, bias, backend="triton", few_rows=True)
        got = weight_only.linear(x, layer, residual=residual)
        assert torch.equal(weight_only.linear(x[-1:], layer, residual=residual[-1:]), got[-1:])
        size = scale.double().reshape(n, -1, 1)
        weight = ((codes.double().unflatten(1, (-1, groups or k)) - zero.double().reshape(n, -1, 1)) * size).flatten(1)
        want = x.double() @ weight.T + bias.double() + residual.double()
        room = x.double().abs() @ weight.abs().T + bias.abs().double() + residual.abs().double()
        assert ((got.double() - want).abs() <= torch.finfo(dtype).eps * want.abs() + 1e-5 * room).all(), (m, n, k)


def test_not_finite_activations_follow_the_rule() -> None:
    """Infinities saturate, NaN becomes the code of zero, a scale of zero keeps zeros and saturates the rest; nothing wraps."""
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, 1.0, -1.0, 3e38], device=GPU).repeat(40, 3)
    for scale in (0.0, 1e-45, 0.5, float("inf")):
        s, z = torch.tensor([scale]), torch.tensor([-3], dtype=torch.int32)
        assert torch.equal(quantize(x, s.to(GPU), z.to(GPU), 8).cpu(), reference.quantize(x.cpu(), s, z, 8)), scale
    codes, scales = quantize_per_token(x, 8)
    want = reference.quantize_per_token(x.cpu(), 8)
    assert torch.equal(codes.cpu(), want[0])
    assert torch.equal(scales.cpu().isnan(), want[1].isnan())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_producers_in_one_graph_with_every_step(dtype: torch.dtype) -> None:
    x, image, row = floats(2, 50, 320, dtype=dtype), floats(2, 64, 9, 9, dtype=dtype), step(0)
    scales, zeros = SCALES.to(GPU) * 0.2, ZEROS.to(GPU)

    def call(row: Tensor) -> list[Tensor]:
        return [
            quantize(x, scales, zeros, 8, row), layer_norm_quantize(x, scales, zeros, step=row),
            gelu_quantize(x, scales, zeros, gated=True, step=row), group_norm_quantize(image, 32, scales, zeros, step=row),
        ]  # fmt: skip

    eager = [call(step(i)) for i in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(row)
    for i in (1, 2, 0):
        row.fill_(i)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(out, eager[i], strict=True)), i
    assert not any(torch.equal(a, b) for a, b in zip(eager[0], eager[1], strict=True))


def test_producers_give_the_same_bits_alone_and_in_a_batch() -> None:
    x, image, scale, zero = floats(4, 70, 640), floats(4, 64, 20, 20), SCALES[:1].to(GPU), ZEROS[:1].to(GPU)
    whole = layer_norm_quantize(x, scale, zero), gelu_quantize(x, scale, zero), group_norm_quantize(image, 32, scale, zero)
    for one in (slice(i, i + 1) for i in range(4)):
        normed, gated = layer_norm_quantize(x[one], scale, zero), gelu_quantize(x[one], scale, zero)
        parts = normed, gated, group_norm_quantize(image[one], 32, scale, zero)
        assert all(torch.equal(part, all_[one]) for part, all_ in zip(parts, whole, strict=True))
    assert F.relu(whole[0].float()).max() > 0
