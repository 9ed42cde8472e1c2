"""Convolution on CPUs: int4 codes are expanded to int8 once, at load. Plain codes (-8..7) are exact in oneDNN with and without VNNI."""

from qdm_kernels.conv2d_w8a8.cpu import Conv2dGeometry, Float32, Int8, Packed, Tiled, Unfolded, accumulate, conv2d, prepare

__all__ = ["Conv2dGeometry", "Float32", "Int8", "Packed", "Tiled", "Unfolded", "accumulate", "conv2d", "prepare"]
