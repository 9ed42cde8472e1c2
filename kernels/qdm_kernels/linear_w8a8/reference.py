"""Linear layer in float64: integers below 2^53 are exact, so this is right by inspection."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_kernels.exact import subtract_zero_point


@dataclass(frozen=True)
class State:
    """weight: codes minus zero point, [N, K] int16."""

    weight: Tensor
    strategy: str = "float64"
    reason: str | None = None


def prepare(codes: Tensor, zero_point: Tensor) -> State:
    """Keep w - z_w; arguments as in `op.prepare`."""
    return State(subtract_zero_point(codes, zero_point))


def accumulate(x: Tensor, zero_point: Tensor, state: State) -> Tensor:
    """sum_k (x - z_x)(w - z_w): x int8 [M, K] -> int32 [M, N]."""
    return ((x.double() - zero_point.double()) @ state.weight.double().T).to(torch.int32)


def linear(x: Tensor, x_scale: Tensor, zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: State) -> Tensor:
    """float(accumulator) * (x_scale * w_scale) + bias: x int8 [M, K] -> float32 [M, N]."""
    y = accumulate(x, zero_point, state).float() * (x_scale * w_scale)
    return y if bias is None else y + bias
