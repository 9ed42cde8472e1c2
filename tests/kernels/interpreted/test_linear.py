"""The Triton linear layers: sums equal int64 truth, outputs equal the reference bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.gemm.tiles import TILES, Plan, Tile
from qdm_kernels.linear_w4a8 import op as op4
from qdm_kernels.linear_w8a8 import op as op8
from qdm_kernels.linear_w8a8 import triton as kernels
from qdm_kernels.quantize.op import quantize

OPS = {8: op8, 4: op4}
SMALL = Tile(32, 32, 64, 4, 2)
SCALES = torch.tensor([0.013, 0.4, 0.0002])
ZEROS = torch.tensor([5, -128, 127], dtype=torch.int32)
STEP = torch.tensor([1], dtype=torch.int32)


def truth(x: Tensor, z_x: int, w: Tensor, z_w: Tensor) -> Tensor:
    return (x.long() - z_x) @ (w.long() - z_w.long()[:, None]).T


def draw(m: int, n: int, k: int, bits: int, seed: int, *, centred: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight codes, weight zero points."""
    rng, limit = torch.Generator().manual_seed(seed), 1 << bits - 1
    x = torch.randint(-128, 128, (m, k), generator=rng, dtype=torch.int8)
    w = torch.randint(-limit, limit, (n, k), generator=rng, dtype=torch.int8)
    zero = torch.randint(-limit, limit, (n,), generator=rng, dtype=torch.int32)
    return x, w, zero * (not centred)


def random_shapes(count: int) -> list[tuple[int, int, int]]:
    """Odd rows, outputs and inputs around the edges of a tile."""
    rng = random.Random(7)
    return [
        (rng.randint(1, 70), rng.randint(1, 70), rng.choice([1, 3, 16, 48, 63, 64, 65, 80, 127, 128, 176, 192, 200])) for _ in range(count)
    ]


@pytest.mark.parametrize("bits", [8, 4])
def test_sums_on_random_shapes(bits: int) -> None:
    """100 shapes each; the plan comes from the table, whose tiles are never smaller than these."""
    for i, (m, n, k) in enumerate(random_shapes(100)):
        x, w, z_w = draw(m, n, k, bits, i, centred=i % 3 > 0)
        state = kernels.prepare(w, z_w, bits)
        assert (state.centre is None) == (i % 3 > 0)
        z = (-128, 0, 9, 127)[i % 4]
        got = kernels.accumulate(x, torch.tensor(z, dtype=torch.int32), state)
        assert got.dtype == torch.int32
        assert torch.equal(got.long(), truth(x, z, w, z_w)), (m, n, k, z)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_every_shipped_tile(tile: Tile, bits: int) -> None:
    m, n, k = tile.bm + 3, tile.bn + 5, 2 * tile.bk
    x, w, z_w = draw(m, n, k, bits, 3)
    state = kernels.prepare(w, z_w, bits)
    got = kernels.launch(x, torch.tensor(7), state, torch.int32, plan=Plan(tile))
    assert torch.equal(got.long(), truth(x, 7, w, z_w))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("centred", [True, False], ids=["z0", "z"])
def test_shares_of_k(bits: int, splits: int, centred: bool) -> None:
    """Eight shares of five blocks: some are empty and must still write zeros."""
    x, w, z_w = draw(37, 41, 320, bits, 1, centred=centred)
    got = kernels.launch(x, torch.tensor(-9), kernels.prepare(w, z_w, bits), torch.int32, plan=Plan(SMALL, splits))
    assert torch.equal(got.long(), truth(x, -9, w, z_w))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("x_code", [-128, 127])
@pytest.mark.parametrize("top", [True, False], ids=["w_max", "w_min"])
def test_extremes(bits: int, x_code: int, top: bool) -> None:
    w_code = (1 << bits - 1) - 1 if top else -(1 << bits - 1)
    x, w = torch.full((2, 1536), x_code, dtype=torch.int8), torch.full((5, 1536), w_code, dtype=torch.int8)
    z_w = torch.zeros(5, dtype=torch.int32)
    got = kernels.accumulate(x, torch.tensor(-128), kernels.prepare(w, z_w, bits))
    assert torch.equal(got.long(), truth(x, -128, w, z_w))


def test_symmetric_weights_with_a_foldable_zero_point_take_no_extra_row() -> None:
    x, w, _ = draw(9, 12, 64, 4, 0)
    z_w = torch.arange(12, dtype=torch.int32) - 6
    state = kernels.prepare(w, z_w, 8)
    assert state.centre is None
    assert torch.equal(kernels.accumulate(x, torch.tensor(3), state).long(), truth(x, 3, w, z_w))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("plan", [Plan(SMALL), Plan(SMALL, 3), Plan(Tile(16, 64, 64, 4, 2, swap=True))], ids=["one", "split", "swap"])
def test_outputs_equal_the_reference_bit_for_bit(bits: int, plan: Plan) -> None:
    """Scale per tensor, by a table, per row; with and without bias."""
    x, w, z_w = draw(19, 40, 192, bits, 5, centred=False)
    w_scale, bias = torch.linspace(1e-3, 3e-3, 40), torch.linspace(-2, 2, 40)
    state, plain = kernels.prepare(w, z_w, bits), OPS[bits].prepare(w, w_scale, z_w, bias, backend="reference")
    call = {"w_scale": w_scale, "bias": bias, "plan": plan}
    got = kernels.launch(x, ZEROS[:1], state, torch.float32, x_scale=SCALES[:1], **call)
    assert torch.equal(got, op8.linear(x, SCALES[0], ZEROS[0], plain))
    got = kernels.launch(x, ZEROS, state, torch.float32, x_scale=SCALES, end=Epilogue(step=STEP), **call)
    assert torch.equal(got, op8.linear(x, SCALES[1], ZEROS[1], plain))
    got = kernels.launch(x, ZEROS[2:], state, torch.float32, x_scale=SCALES, end=Epilogue(step=STEP), **call)
    assert torch.equal(got, op8.linear(x, SCALES[1], ZEROS[2], plain))
    rows = torch.linspace(1e-3, 1e-2, 19)[:, None]
    assert torch.equal(kernels.launch(x, ZEROS[:1], state, torch.float32, x_scale=rows, **call), op8.linear(x, rows, ZEROS[0], plain))
    call["bias"] = None
    got = kernels.launch(x, ZEROS[:1], state, torch.float32, x_scale=SCALES[:1], **call)
    assert torch.equal(got, op8.linear(x, SCALES[0], ZEROS[0], OPS[bits].prepare(w, w_scale, z_w, None, backend="reference")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh"])
def test_epilogues_are_within_one_step_of_float64(dtype: torch.dtype, activation: str) -> None:
    x, w, z_w = draw(21, 33, 64, 8, 2)
    w_scale, bias = torch.linspace(1e-4, 1e-3, 33), torch.linspace(-1, 1, 33)
    residual = torch.randn(21, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    end = Epilogue(activation=activation, residual=residual, out_dtype=dtype)
    got = kernels.launch(
        x, ZEROS[:1], kernels.prepare(w, z_w), dtype, x_scale=SCALES[:1], w_scale=w_scale, bias=bias, end=end, plan=Plan(SMALL)
    )
    y = truth(x, int(ZEROS[0]), w, z_w).double() * SCALES[0].double() * w_scale.double() + bias.double()
    want = finish(y, Epilogue(activation=activation)) if activation != "none" else y
    want = want + residual.double()
    step = torch.finfo(dtype).eps * (want.abs() + y.abs() + 1)
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= step).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("plan", "centred"), [(Plan(SMALL), True), (Plan(SMALL, 2), True), (Plan(TILES[10]), True), (Plan(SMALL), False)])
def test_gated_outputs(plan: Plan, centred: bool, bits: int) -> None:
    """Tiles that end inside the values, in one share of K and in two, with few rows, with weights that keep their zero points."""
    m, n, k = min(plan.tile.bm, 32) - 3, 2 * (plan.tile.bn + 6), 320
    x, w, z_w = draw(m, n, k, bits, 4, centred=centred)
    layer = OPS[bits].prepare(w, torch.rand(n) * 1e-3, z_w, torch.randn(n), backend="reference")
    state, residual = kernels.prepare(w, z_w, bits), torch.randn(m, n // 2)
    end = Epilogue("geglu", residual, torch.float32, step=STEP)
    keys = {"x_scale": SCALES, "w_scale": layer.scale, "bias": layer.bias, "end": end}
    got = kernels.launch(x, ZEROS, state, torch.float32, **keys, plan=plan)
    value, gate = op8.linear(x, SCALES, ZEROS, layer, step=STEP).double().chunk(2, -1)
    assert torch.allclose(got.double(), value * torch.nn.functional.gelu(gate) + residual.double(), rtol=1e-5, atol=1e-4)


def test_int8_output_is_the_codes_of_the_next_layer() -> None:
    x, w, z_w = draw(21, 33, 64, 8, 2)
    w_scale = torch.linspace(1e-4, 1e-3, 33)
    call = {"x_scale": SCALES[:1], "w_scale": w_scale, "plan": Plan(SMALL)}
    state = kernels.prepare(w, z_w)
    y = kernels.launch(x, ZEROS[:1], state, torch.float32, **call)
    end = Epilogue(out_dtype=torch.int8, out_scale=SCALES, out_zero_point=ZEROS, step=STEP)
    got = kernels.launch(x, ZEROS[:1], state, torch.int8, end=end, **call)
    assert torch.equal(got, quantize(y, SCALES[1], ZEROS[1], 8))


def test_the_public_call_and_batch_positions() -> None:
    """A row's output is the same bits alone, at another place of a batch, and on another backend."""
    x, w, z_w = draw(12, 24, 96, 8, 4)
    w_scale, bias = torch.rand(24) * 1e-3, torch.randn(24)
    layer, plain = (op8.prepare(w, w_scale, z_w, bias, backend=name) for name in ("triton", "reference"))
    assert (layer.backend, layer.strategy, layer.reason) == ("triton", "triton", None)
    whole = op8.linear(x.reshape(3, 4, 96), SCALES, ZEROS, layer, step=STEP)
    assert torch.equal(whole, op8.linear(x.reshape(3, 4, 96), SCALES, ZEROS, plain, step=STEP))
    for i in range(12):
        assert torch.equal(op8.linear(x[i], SCALES, ZEROS, layer, step=STEP), whole.reshape(12, 24)[i])
    assert torch.equal(op8.linear(x[:, :].T.contiguous().T, SCALES, ZEROS, layer, step=STEP), whole.reshape(12, 24))
    assert op8.linear(x[:0], SCALES, ZEROS, layer, step=STEP).shape == (0, 24)
    assert torch.equal(op8.linear(x, SCALES, ZEROS, layer, step=STEP), op8.linear(x, SCALES, ZEROS, layer, step=STEP))


def test_too_many_inputs_are_refused() -> None:
    codes = torch.zeros((1, 131_072), dtype=torch.int8)
    one = torch.ones(1)
    with pytest.raises(ValueError, match="can saturate int32"):
        op8.prepare(codes, one, one.int(), None, backend="triton")
    assert "can saturate int32" in (op8.prepare(codes, one, one.int(), None).reason or "")
