"""Weight-only linear layer in float64 over the storage layout of int4 (README: Packing layout)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.layout import pack_int4, unpack_int4


@dataclass(frozen=True)
class State:
    """packed: uint8 [N, ceil64(K) / 2]; inputs: K; scale: float32, zero_point: int, [N] or [N, G]."""

    packed: Tensor
    inputs: int
    scale: Tensor
    zero_point: Tensor
    strategy: str = "float64"
    reason: str | None = None

    @property
    def outputs(self) -> int:
        """N."""
        return self.packed.shape[0]


def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor) -> State:
    """Pack two codes to a byte; arguments as in `op.prepare`."""
    return State(pack_int4(codes), codes.shape[1], scale, zero_point)


def linear(x: Tensor, bias: Tensor | None, state: State, end: Epilogue) -> Tensor:
    """x float [M, K] -> [M, N] of end.out_dtype; rounded to float32 once, before the epilogue."""
    weight = dequantize(unpack_int4(state.packed, state.inputs), state.scale, state.zero_point, torch.float64)
    y = x.double() @ weight.T
    return finish((y if bias is None else y + bias.double()).float(), end)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """(q - z) * s: codes int8 [N, K], scale and zero_point [N] or [N, G] -> [N, K]."""
    groups = codes.unflatten(1, (-1, codes.shape[1] // scale.reshape(len(scale), -1).shape[1])).to(dtype)
    shape = (len(scale), -1, 1)
    return ((groups - zero_point.reshape(shape).to(dtype)) * scale.reshape(shape).to(dtype)).flatten(1)
