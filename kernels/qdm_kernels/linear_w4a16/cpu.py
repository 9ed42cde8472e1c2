"""Weight-only linear layer on CPUs: weights are expanded to float32 once, at load. int4 products of torch lose from 8 rows on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.linear_w4a16.reference import dequantize


@dataclass(frozen=True)
class State:
    """weight: float32 [N, K]."""

    weight: Tensor
    strategy: str = "fp32"
    reason: str | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.weight.shape[0]


def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor) -> State:
    """Dequantize; arguments as in `op.prepare`."""
    return State(dequantize(codes, scale, zero_point, torch.float32))


def linear(x: Tensor, bias: Tensor | None, state: State, end: Epilogue) -> Tensor:
    """x float [M, K] -> [M, N] of end.out_dtype."""
    return finish(torch.nn.functional.linear(x.float(), state.weight, bias), end)
