"""Linear layer with int8 weights and float activations; contract, call and errors of linear_w4a16. Operator qdm::linear_w8a16."""

from torch import Tensor

from qdm_kernels.linear_w4a16.op import PreparedWeight, linear, prepare_as, register
from qdm_kernels.prepared import integer_op

__all__ = ["PreparedWeight", "linear", "prepare"]

register("linear_w8a16")


@integer_op
def prepare(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, backend: str | None = None, few_rows: bool = False
) -> PreparedWeight:
    """Pack a weight once: codes int8 [N, K]; the rest and the errors as in `linear_w4a16.op.prepare`."""
    return prepare_as("linear_w8a16", 8, codes, scale, zero_point, bias, backend, few_rows)
