"""Linear layer in float64 over weights kept in the storage layout of int4 (README: Packing layout), expanded on every call."""

from dataclasses import dataclass

from torch import Tensor

from qdm_kernels.layout import pack_int4, unpack_int4
from qdm_kernels.linear_w8a8 import reference as wide


@dataclass(frozen=True)
class State:
    """packed: uint8 [N, ceil64(K) / 2]; inputs: K; zero_point: int [N]."""

    packed: Tensor
    inputs: int
    zero_point: Tensor
    strategy: str = "float64"
    reason: str | None = None


def prepare(codes: Tensor, zero_point: Tensor) -> State:
    """Pack two codes to a byte; arguments as in `op.prepare`."""
    return State(pack_int4(codes), codes.shape[1], zero_point)


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum_k (x - z_x)(w - z_w): x int8 [M, K] -> int32 [M, N]."""
    return wide.accumulate(x, zero_point, _expanded(state))


def linear(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """float(accumulator) * (x_scale * w_scale) + bias: x int8 [M, K] -> float32 [M, N]."""
    return wide.linear(x, x_scale, zero_point, w_scale, bias, _expanded(state))


def _expanded(state: State) -> wide.State:
    return wide.prepare(unpack_int4(state.packed, state.inputs), state.zero_point)
