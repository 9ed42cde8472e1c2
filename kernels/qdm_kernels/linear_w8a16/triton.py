"""Weight-only linear layer on CUDA GPUs over int8 weights: the kernel of linear_w4a16 turns them into floats between load and product."""

from torch import Tensor

from qdm_kernels.linear_w4a16.triton import State, linear
from qdm_kernels.linear_w4a16.triton import prepare as _prepare

__all__ = ["State", "linear", "prepare"]


def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor, *, few_rows: bool = False) -> State:
    """Pad the codes to whole blocks of 64; arguments as in `op.prepare`."""
    return _prepare(codes, scale, zero_point, bits=8, few_rows=few_rows)
