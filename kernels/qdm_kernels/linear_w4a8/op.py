"""Linear layer with int4 weights; the contract, the call and the errors of linear_w8a8. Operator qdm::linear_w4a8."""

from torch import Tensor

from qdm_kernels.layout import check_codes
from qdm_kernels.linear_w8a8.op import PreparedLinear, accumulate, linear, prepare_as, register
from qdm_kernels.prepared import integer_op

__all__ = ["PreparedLinear", "accumulate", "linear", "prepare"]

register("linear_w4a8")


@integer_op
def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, backend: str | None = None) -> PreparedLinear:
    """Pack a weight once: codes int8 [N, K] within [-8, 7]; the rest and the errors as in `linear_w8a8.op.prepare`."""
    check_codes(codes, 4)
    return prepare_as("linear_w4a8", codes, scale, zero_point, bias, backend)
