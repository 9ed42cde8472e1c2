"""`quantize.cpp` on tensors."""

import ctypes
from functools import cache

import torch
from torch import Tensor

from qdm_kernels.native.build import library

_KINDS = {torch.float32: "f32", torch.bfloat16: "bf16"}


def takes(x: Tensor) -> bool:
    """Does the native loop read this dense CPU tensor?"""
    return x.dtype in _KINDS and x.device.type == "cpu" and library("quantize") is not None


def quantize_into(x: Tensor, codes: Tensor, inverse: float, zero_point: int, bits: int, *, unsigned: bool = False) -> None:
    """Codes of x, float32 or bfloat16, into int8 or uint8 `codes`, both dense and in one order. unsigned: shifted by +128 for oneDNN."""
    call = _function(x.dtype)
    call(x.data_ptr(), codes.data_ptr(), x.numel(), inverse, zero_point, bits, 0x80 if unsigned else 0, torch.get_num_threads())


@cache
def _function(dtype: torch.dtype):
    made = library("quantize")
    assert made is not None
    function = getattr(made, f"qdm_quantize_{_KINDS[dtype]}")
    integers = [ctypes.c_int] * 4
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, *integers], None
    return function
