"""Weight-only linear layer in float64 over int8 codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.linear_w4a16.reference import dequantize


@dataclass(frozen=True)
class State:
    """codes: int8 [N, K]; scale: float32, zero_point: int, [N] or [N, G]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    strategy: str = "float64"
    reason: str | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.codes.shape[0]


def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor) -> State:
    """Keep the codes; arguments as in `op.prepare`."""
    return State(codes, scale, zero_point)


def linear(x: Tensor, bias: Tensor | None, state: State, end: Epilogue) -> Tensor:
    """x float [M, K] -> [M, N] of end.out_dtype; rounded to float32 once, before the epilogue."""
    y = x.double() @ dequantize(state.codes, state.scale, state.zero_point, torch.float64).T
    return finish((y if bias is None else y + bias.double()).float(), end)
