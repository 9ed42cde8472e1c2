"""y = s_out * ((x * s_in) (W_q - z)) + bias against float64 autograd of the materialised weight (quantization spec 8.2, TuneQDM)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qdm_cli.engine.quant.grid import PerGroup, broadcast
from qdm_cli.engine.quant.scale_function import CodedOperand, pack_codes, scaled_product, unpack_codes

RNG = torch.Generator().manual_seed(5)

CASES: dict[str, dict[str, Any]] = {
    "linear": {"shape": (24, 40), "x": (6, 40)},
    "linear, tokens": {"shape": (24, 40), "x": (2, 7, 40)},
    "linear, odd sizes": {"shape": (5, 33), "x": (3, 33)},
    "conv": {"shape": (12, 10, 3, 3), "x": (2, 10, 9, 8), "conv": ((1, 1), (1, 1), (1, 1), 1)},
    "conv, stride, dilation": {"shape": (12, 10, 3, 3), "x": (2, 10, 11, 8), "conv": ((2, 1), (1, 2), (1, 2), 1)},
    "conv, groups": {"shape": (12, 3, 3, 3), "x": (2, 6, 7, 7), "conv": ((1, 1), (1, 1), (1, 1), 2)},
    "conv 1x1": {"shape": (7, 70, 1, 1), "x": (3, 70, 4, 4), "conv": ((1, 1), (0, 0), (1, 1), 1)},
}


def operand_of(shape: tuple[int, ...], bits: int, conv: Any = None, groups_of: int | None = None) -> tuple[CodedOperand, Tensor]:
    """A random integer weight, and W_q - z (times the group scales) in float64."""
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1)
    codes = torch.randint(low, high, shape, generator=RNG).to(torch.int8)
    columns = () if groups_of is None else (shape[1] // groups_of,)
    zero = torch.randint(low, high, (shape[0], *columns), generator=RNG).to(torch.int8)
    scale = None if groups_of is None else torch.rand(shape[0], *columns, generator=RNG) + 0.5
    if groups_of is None:
        centred = codes.double() - zero.double().reshape(-1, *([1] * (len(shape) - 1)))
    else:
        grain = PerGroup(groups_of)
        centred = (codes.double() - broadcast(zero.double(), shape, grain)) * broadcast(scale.double(), shape, grain)
    return CodedOperand(pack_codes(codes, bits), zero, bits, shape, scale, conv), centred


def materialised(x: Tensor, s_out: Tensor, s_in: Tensor | None, bias: Tensor | None, weight: Tensor, conv: Any) -> Tensor:
    """The layer with a float weight s_out (W_q - z) s_in; s_in of a grouped convolution belongs to its own channels of each group."""
    rows = s_out.reshape(-1, *([1] * (weight.ndim - 1)))
    if s_in is None:
        columns: Any = 1.0
    elif conv is None:
        columns = s_in.reshape(1, -1)
    else:
        # filter o of group g reads input channels g * I .. (g + 1) * I - 1
        columns = s_in.reshape(conv[3], weight.shape[1]).repeat_interleave(weight.shape[0] // conv[3], 0)[..., None, None]
    full = rows * weight * columns
    return F.linear(x, full, bias) if conv is None else F.conv2d(x, full, bias, *conv)


def leaves(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(11)
    inputs = case["x"][-1] if "conv" not in case else case["x"][1]
    x = torch.randn(case["x"], generator=rng, dtype=torch.float64)
    s_out = torch.rand(case["shape"][0], generator=rng, dtype=torch.float64) * 0.02 + 0.01
    s_in = torch.rand(inputs, generator=rng, dtype=torch.float64) + 0.5
    bias = torch.randn(case["shape"][0], generator=rng, dtype=torch.float64)
    return tuple(t.to(dtype) for t in (x, s_out, s_in, bias))  # type: ignore[return-value]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
class TestAgainstTheMaterialisedWeight:
    def gradients(self, case: dict[str, Any], bits: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        operand, centred = operand_of(case["shape"], bits, case.get("conv"))
        results = []
        for kind, form in ((torch.float64, "materialised"), (dtype, "packed")):
            x, s_out, s_in, bias = leaves(case, kind)
            for leaf in (x, s_out, s_in):
                leaf.requires_grad_(True)
            if form == "packed":
                y = scaled_product(x, s_out, s_in, bias, operand)
            else:
                y = materialised(x, s_out, s_in, bias, centred, case.get("conv"))
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(y)
            results.append([y.detach(), *torch.autograd.grad((y * weights).sum(), (x, s_out, s_in))])
        return results[0], results[1]

    def test_in_float64(self, case: dict[str, Any], bits: int) -> None:
        wanted, found = self.gradients(case, bits, torch.float64)
        assert [relative(a, b) for a, b in zip(found, wanted, strict=True)] == pytest.approx([0] * 4, abs=1e-12)

    def test_in_float32(self, case: dict[str, Any], bits: int) -> None:
        wanted, found = self.gradients(case, bits, torch.float32)
        assert max(relative(a, b) for a, b in zip(found, wanted, strict=True)) <= 1e-6


@pytest.mark.parametrize("name", ["linear", "linear, tokens", "conv", "conv, groups"])
def test_a_row_per_sample_equals_a_loop_over_samples(name: str) -> None:
    case = CASES[name]
    operand, _ = operand_of(case["shape"], 4, case.get("conv"))
    x, s_out, s_in, bias = leaves(case, torch.float64)
    outs = torch.stack([s_out * (1 + i) for i in range(len(x))]).requires_grad_(True)
    ins = torch.stack([s_in + i for i in range(len(x))]).requires_grad_(True)
    y = scaled_product(x, outs, ins, bias, operand)
    loop = torch.cat([scaled_product(x[i : i + 1], outs[i], ins[i], bias, operand) for i in range(len(x))])
    torch.testing.assert_close(y, loop, rtol=1e-12, atol=1e-12)
    together, apart = (torch.autograd.grad(v.square().sum(), (outs, ins)) for v in (y, loop))
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_row_per_sample_for_a_batch_of_several_tiles() -> None:
    """Attention folds heads or frames into the batch: B timesteps serve a multiple of B rows."""
    case = CASES["linear, tokens"]
    operand, _ = operand_of(case["shape"], 4)
    x, s_out, s_in, bias = leaves(case, torch.float64)
    wide = torch.cat([x, x + 1, x - 1])[torch.tensor([0, 2, 4, 1, 3, 5])]
    rows = torch.stack([s_out, 2 * s_out]).requires_grad_(True)
    y = scaled_product(wide, rows, torch.stack([s_in, s_in]), bias, operand)
    torch.testing.assert_close(y[3:], scaled_product(wide[3:], rows[1], s_in, bias, operand))
    (grad,) = torch.autograd.grad(y.sum(), rows)
    assert grad.shape == rows.shape
    with pytest.raises(ValueError, match="2 timesteps for a batch of 5"):
        scaled_product(wide[:5], rows, None, bias, operand)


def test_grouped_weight_scales_stay_and_s_out_multiplies_them() -> None:
    case = CASES["linear"]
    operand, centred = operand_of(case["shape"], 4, groups_of=8)
    x, s_out, s_in, bias = leaves(case, torch.float64)
    wanted = materialised(x, s_out, s_in, bias, centred, None)
    torch.testing.assert_close(scaled_product(x, s_out, s_in, bias, operand), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 5), (4, 64), (6, 5, 3, 3), (2, 64, 1, 1)])
@pytest.mark.parametrize("bits", [2, 4, 5, 8])
def test_codes_survive_packing(shape: tuple[int, ...], bits: int) -> None:
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), shape, generator=RNG).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert torch.equal(unpack_codes(packed, bits, shape), codes)
    assert packed.dtype == (torch.uint8 if bits <= 4 else torch.int8)


@pytest.mark.parametrize("name", ["linear, tokens", "conv"])
def test_nothing_of_the_weights_size_is_kept_for_the_backward(name: str) -> None:
    case = CASES[name]
    operand, centred = operand_of(case["shape"], 4, case.get("conv"))
    x, s_out, s_in, bias = leaves(case, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        scaled_product(x, s_out.requires_grad_(True), s_in.requires_grad_(True), bias, operand)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), s_out.data_ptr(), s_in.data_ptr()}
    kept.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        materialised(x, s_out, s_in, bias, centred.float(), case.get("conv"))
    assert any(t.numel() == centred.numel() for t in kept), "the oracle must show what is avoided"
