"""2-D convolution with int4 weights; the contract, the call and the errors of conv2d_w8a8. Operator qdm::conv2d_w4a8."""

from torch import Tensor

from qdm_kernels.conv2d_w8a8.op import PreparedConv2d, accumulate, conv2d, prepare_as, register
from qdm_kernels.geometry import Conv2dGeometry, Pair
from qdm_kernels.layout import check_codes
from qdm_kernels.prepared import integer_op

__all__ = ["PreparedConv2d", "accumulate", "conv2d", "prepare"]

register("conv2d_w4a8")


@integer_op
def prepare(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    *,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    groups: int = 1,
    padding_end: Pair | None = None,
    backend: str | None = None,
) -> PreparedConv2d:
    """Pack a weight once: codes int8 [O, I / groups, kh, kw] within [-8, 7]; the rest and the errors as in `conv2d_w8a8.op.prepare`."""
    check_codes(codes, 4)
    geometry = Conv2dGeometry(stride, padding, dilation, groups, padding_end)
    return prepare_as("conv2d_w4a8", codes, scale, zero_point, bias, geometry, backend)
