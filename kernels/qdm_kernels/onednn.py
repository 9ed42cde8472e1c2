"""The oneDNN int8 operators behind torch's private API, in one place: unsigned activations, signed weights, float32 or bfloat16 out.

Output = float(sum_k (x - zero_point) * w) * scale, one multiply. The zero point is an argument of each call, not of the packing:
the packed weight does not depend on the one given to `qconv_prepack` (tested), so a step's row can change without packing again.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.geometry import Conv2dGeometry


def pack_linear(codes: Tensor) -> Tensor:
    """Pack weight codes, [N, K] int8, into oneDNN's opaque layout. The caller must not pass a transposed view: it is made contiguous."""
    return torch.ops.onednn.qlinear_prepack(codes.contiguous(), None)


def linear(
    x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, zeros: Tensor, *, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Integer product: x [M, K] uint8, scale [N] float32, zeros [N] int64 (all 0) -> [M, N] float32, or rounded once to bfloat16."""
    return torch.ops.onednn.qlinear_pointwise(x, 1.0, zero_point, packed, scale, zeros, bias, 1.0, 0, out_dtype, "none", [], "")


def pack_conv2d(codes: Tensor, geometry: Conv2dGeometry) -> Tensor:
    """Pack weight codes, [O, I / groups, kh, kw] int8, into oneDNN's opaque layout."""
    g = geometry
    ones = torch.ones(codes.shape[0])
    return torch.ops.onednn.qconv_prepack(codes.contiguous(), ones, 1.0, 0, [*g.stride], [*g.padding], [*g.dilation], g.groups, None)


def conv2d(
    x: Tensor, zero_point: int, packed: Tensor, scale: Tensor, zeros: Tensor, geometry: Conv2dGeometry, *, bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    """Integer convolution: x [B, I, H, W] uint8 -> [B, O, H', W'], both channels_last. Padding is real 0, the code zero_point.

    Kernels of more than one pixel get outputs one pixel wide wrong on CPUs with VNNI (oneDNN 3.12): those are computed two wide.
    """
    g = geometry
    where: Sequence[list[int] | int] = ([*g.stride], [*g.padding], [*g.dilation], g.groups)
    narrow = g.output_size((x.shape[2], x.shape[3]), (packed.shape[2], packed.shape[3]))[1] == 1
    if narrow:
        x = F.pad(x, (0, g.stride[1]), value=zero_point).contiguous(memory_format=torch.channels_last)
    args = (x, 1.0, zero_point, packed, scale, zeros, bias, *where, 1.0, 0, out_dtype, "none", [], "")
    y = torch.ops.onednn.qconv2d_pointwise(*args)
    return y[..., :1].contiguous(memory_format=torch.channels_last) if narrow else y


def to_unsigned(codes: Tensor) -> Tensor:
    """Shift signed codes to unsigned by +128: int8 -> uint8, one pass, memory format kept. uint8 codes are shifted already."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8).bitwise_xor(0x80)
