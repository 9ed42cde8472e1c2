"""Linear layer on CUDA GPUs over weights that stay two to a byte: the kernel of linear_w8a8 unpacks them between load and product."""

from torch import Tensor

from qdm_kernels.linear_w8a8.triton import State, accumulate, launch, linear, why_not
from qdm_kernels.linear_w8a8.triton import prepare as _prepare

__all__ = ["State", "accumulate", "launch", "linear", "prepare", "why_not"]


def prepare(codes: Tensor, zero_point: Tensor) -> State:
    """Pack two codes to a byte, in two K-planes of 32 per 64 inputs; arguments as in `op.prepare`."""
    return _prepare(codes, zero_point, bits=4)
