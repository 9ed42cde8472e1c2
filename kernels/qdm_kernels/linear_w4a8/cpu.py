"""Linear layer on CPUs: int4 codes are expanded to int8 once, at load. Plain codes (-8..7) are exact in oneDNN with and without VNNI."""

from qdm_kernels.linear_w8a8.cpu import Float32, Int8, Packed, Tiled, accumulate, linear, prepare

__all__ = ["Float32", "Int8", "Packed", "Tiled", "accumulate", "linear", "prepare"]
