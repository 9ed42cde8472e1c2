"""Linear layer on CPUs: products of our own, else oneDNN u8 x s8 where exact for these weights, else float32 (README: Strategies)."""

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor

from qdm_kernels import backend, onednn
from qdm_kernels.exact import (
    Slice,
    l1_by_input,
    rescale_,
    split_exact,
    subtract_input_sum,
    subtract_zero_point,
    why_not_int8,
)
from qdm_kernels.native import tiles
from qdm_kernels.native.tiles import Packed


@dataclass(frozen=True)
class Int8:
    """Weights in oneDNN's layout. centre: None = zero points are folded in; else z_w, int32 [N], and a last row of ones is packed too."""

    packed: Tensor
    centre: Tensor | None
    ones: Tensor  # float32 [rows]: the scale that returns the accumulator
    zeros: Tensor  # int64 [rows]
    slices: tuple[Slice, ...]
    strategy: str = "onednn"
    reason: str | None = None
    reads_unsigned: ClassVar[bool] = True


@dataclass(frozen=True)
class Tiled:
    """Weights in panels for what `strategy`, one of `tiles.STRATEGIES`, multiplies with."""

    packed: Packed
    strategy: str
    reason: str | None = None

    @property
    def reads_unsigned(self) -> bool:
        return bool(self.packed.flip)


@dataclass(frozen=True)
class Float32:
    """Weights minus zero point as float32, cut along K so that every partial sum is exact. row_sums: int32 [N]."""

    pieces: tuple[tuple[Slice, Tensor], ...]
    row_sums: Tensor
    reason: str | None
    strategy: str = "fp32"
    reads_unsigned: ClassVar[bool] = False


def prepare(codes: Tensor, zero_point: Tensor) -> Tiled | Int8 | Float32:
    """Pack for the fastest exact strategy on this CPU; arguments as in `op.prepare`."""
    packed = tiled_weight(codes, zero_point)
    return prepare_untiled(codes, zero_point) if packed is None else Tiled(packed, cast(str, tiles.kind()))


def tiled_weight(codes: Tensor, zero_point: Tensor) -> Packed | None:
    """A weight [N, K] and its zero points [N] in panels; None where this CPU or the layer has none."""
    return tiles.pack(codes, zero_point) if tiles.takes(*codes.shape) else None


def prepare_untiled(codes: Tensor, zero_point: Tensor) -> Int8 | Float32:
    """Pack for oneDNN or float32."""
    weight = subtract_zero_point(codes, zero_point)
    folded, reason = why_not_int8("linear_w8a8", codes, weight)
    if reason is not None:
        return _prepare_float32(weight, reason)
    if folded:
        return _prepare_int8(weight.to(torch.int8), None)
    ones_row = torch.ones((1, codes.shape[1]), dtype=torch.int8)
    return _prepare_int8(torch.cat([codes, ones_row]), zero_point.to(torch.int32))


def _prepare_int8(weight: Tensor, centre: Tensor | None) -> Int8:
    rows = weight.shape[0]
    slices = split_exact(l1_by_input(weight.to(torch.int16)), 255)
    return Int8(onednn.pack_linear(weight), centre, torch.ones(rows), torch.zeros(rows, dtype=torch.int64), slices)


def _prepare_float32(weight: Tensor, reason: str) -> Float32:
    slices = split_exact(l1_by_input(weight), 128)
    pieces = tuple(((a, b), weight[:, a:b].float()) for a, b in slices)
    return Float32(pieces, weight.sum(1).to(torch.int32), reason)


def accumulate(x: Tensor, zero_point: Tensor, state: Tiled | Int8 | Float32) -> Tensor:
    """sum_k (x - z_x)(w - z_w): x int8 [M, K] -> int32 [M, N]."""
    z = int(zero_point)
    if isinstance(state, Tiled):
        none = torch.zeros(state.packed.outputs)
        return tiles.product(x, z, state.packed, none, None, torch.empty((len(x), state.packed.outputs), dtype=torch.int32))
    if isinstance(state, Int8):
        return _accumulate_int8(onednn.to_unsigned(x), z + 128, state)
    sums = sum(torch.nn.functional.linear(x[:, a:b].float(), weight).to(torch.int32) for (a, b), weight in state.pieces)
    return sums - z * state.row_sums


def _accumulate_int8(x: Tensor, z: int, state: Int8) -> Tensor:
    sums = sum(onednn.linear(part, z, state.packed, state.ones, state.zeros).to(torch.int32) for part in _masked(x, z, state.slices))
    return sums if state.centre is None else sums[:, :-1] - sums[:, -1:] * state.centre


def _masked(x: Tensor, z: int, slices: tuple[Slice, ...]):
    """The input once per slice, real zero outside it: the packed weight cannot be cut, the input can."""
    if len(slices) == 1:
        yield x
        return
    for a, b in slices:
        part = torch.full_like(x, z)
        part[:, a:b] = x[:, a:b]
        yield part


def linear(
    x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: Tiled | Int8 | Float32,
    out_dtype: torch.dtype = torch.float32, residual: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """float(accumulator) * (x_scale * w_scale) + bias: x int8 [M, K] -> [M, N], float32 or, where that saves a pass, `out_dtype`.

    residual: [M, N] of out_dtype, added last; for tiles alone.
    """
    if isinstance(state, Tiled):
        out = torch.empty((len(x), state.packed.outputs), dtype=out_dtype if out_dtype == torch.bfloat16 else torch.float32)
        scale, own = (x_scale * w_scale, None) if x_scale.dim() == 0 else (w_scale, x_scale.contiguous())
        return tiles.product(x, int(zero_point), state.packed, scale, bias, out, row_scale=own, residual=residual)
    if isinstance(state, Float32):
        return rescale_(_sums_float32(x, zero_point, state), x_scale, w_scale, bias)
    unsigned, z = onednn.to_unsigned(x), int(zero_point) + 128
    if state.centre is None and x_scale.dim() == 0:
        # oneDNN multiplies the converted accumulator once: the contract's own rounding (probed), one pass less over y.
        probe = backend.probe()
        fused = bias if probe.fused_bias else None
        direct = out_dtype if fused is bias and probe.bf16_output and out_dtype == torch.bfloat16 else torch.float32
        y = onednn.linear(unsigned, z, state.packed, x_scale * w_scale, state.zeros, bias=fused, out_dtype=direct)
        return y if bias is fused else y.add_(bias)
    sums = onednn.linear(unsigned, z, state.packed, state.ones, state.zeros)
    if state.centre is not None:
        corrected = subtract_input_sum(sums, state.centre.float(), dim=1)
        sums = _accumulate_int8(unsigned, z, state).float() if corrected is None else corrected
    return rescale_(sums, x_scale, w_scale, bias)


def from_floats(
    x: Tensor, source: tiles.Source, scale: Tensor, bias: Tensor | None, state: Tiled, residual: Tensor | None = None
) -> Tensor:
    """`linear` of the codes that `source` makes of x [..., K], in one pass: the dtype of x, which `producers.takes`. scale: [N]."""
    out = torch.empty((*x.shape[:-1], state.packed.outputs), dtype=x.dtype)
    rows, flat = x.reshape(-1, x.shape[-1]).contiguous(), out.view(-1, state.packed.outputs)
    added = None if residual is None else residual.reshape(flat.shape).contiguous()
    tiles.product(rows, source.grid.zero_point, state.packed, scale, bias, flat, residual=added, source=source)
    return out


def _sums_float32(x: Tensor, zero_point: Tensor, state: Float32) -> Tensor:
    """float(accumulator), rounded once. In one piece A and z * row_sums are exact, so their difference is."""
    if len(state.pieces) > 1:
        return accumulate(x, zero_point, state).float()
    sums, z = torch.nn.functional.linear(x.float(), state.pieces[0][1]), int(zero_point)
    return sums.sub_((z * state.row_sums).float()) if z else sums
