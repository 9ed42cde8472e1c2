"""Convolution on CUDA GPUs over weights that stay two to a byte: the kernel of conv2d_w8a8 unpacks them between load and product."""

from torch import Tensor

from qdm_kernels.conv2d_w8a8.triton import Conv2dGeometry, State, accumulate, conv2d, launch, why_not
from qdm_kernels.conv2d_w8a8.triton import prepare as _prepare

__all__ = ["Conv2dGeometry", "State", "accumulate", "conv2d", "launch", "prepare", "why_not"]


def prepare(codes: Tensor, zero_point: Tensor, geometry: Conv2dGeometry) -> State:
    """Pack two codes to a byte, in two K-planes of 32 per 64 channels; arguments as in `op.prepare`."""
    return _prepare(codes, zero_point, geometry, bits=4)
