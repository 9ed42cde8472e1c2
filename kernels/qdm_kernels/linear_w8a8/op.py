"""Linear layer on integer codes: y = float(sum_k (x - z_x)(w - z_w)) * (s_x * s_w) + bias (README: Arithmetic contract)."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.exact import check_int32, subtract_zero_point
from qdm_kernels.linear_w8a8 import cpu, reference
from qdm_kernels.prepared import Prepared, check_activation, check_weight, integer_op

_IMPLEMENTATIONS = {"cpu": cpu, "reference": reference}


@dataclass(frozen=True)
class PreparedLinear(Prepared):
    """A weight packed for one backend. strategy: how it computes; reason: why not by oneDNN int8, None = it does or was not asked."""

    backend: str
    in_features: int
    out_features: int
    scale: Tensor  # float32 [N]
    bias: Tensor | None  # float32 [N]
    state: Any

    @property
    def strategy(self) -> str:
        """`onednn`, `fp32` or `float64`."""
        return self.state.strategy

    @property
    def reason(self) -> str | None:
        """Why the oneDNN int8 kernel was passed over."""
        return self.state.reason


@integer_op
def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, backend: str | None = None) -> PreparedLinear:
    """Pack a weight once: codes int8 [N, K], scale float32 [N], zero_point int [N], bias float32 [N] or None.

    4-bit weights come as plain codes (-8..7). backend: None = `qdm_kernels.backend.choose`.
    ValueError on wrong shapes or dtypes, a backend that cannot run, or a layer whose accumulator could overflow int32.
    """
    check_weight(codes, scale, zero_point, bias, dim=2)
    check_int32(subtract_zero_point(codes, zero_point))
    name = _backend.choose("linear_w8a8", device=codes.device, backend=backend)
    n, k = codes.shape
    kept_bias = None if bias is None else bias.detach().float()
    return PreparedLinear(name, k, n, scale.detach().float(), kept_bias, _IMPLEMENTATIONS[name].prepare(codes, zero_point))


@integer_op
def linear(x_codes: Tensor, x_scale: Tensor, x_zero_point: Tensor, prepared: PreparedLinear) -> Tensor:
    """Apply a prepared layer: x_codes int8 [..., K] -> float32 [..., N], bit-identical on every backend.

    x_scale: float32, one element, or [..., 1] per token; x_zero_point: int, one element. ValueError on another dtype or shape.
    """
    rows, lead = _rows(x_codes, x_zero_point, prepared)
    s = x_scale.reshape(()) if x_scale.numel() == 1 else x_scale.expand(*lead, 1).reshape(-1, 1)
    y = _IMPLEMENTATIONS[prepared.backend].linear(rows, s.float(), x_zero_point, prepared.scale, prepared.bias, prepared.state)
    return y.reshape(*lead, prepared.out_features)


@integer_op
def accumulate(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear) -> Tensor:
    """Exact integer part: sum_k (x - z_x)(w - z_w), x_codes int8 [..., K] -> int32 [..., N]. Errors as `linear`."""
    rows, lead = _rows(x_codes, x_zero_point, prepared)
    sums = _IMPLEMENTATIONS[prepared.backend].accumulate(rows, x_zero_point, prepared.state)
    return sums.reshape(*lead, prepared.out_features)


def _rows(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear) -> tuple[Tensor, torch.Size]:
    check_activation(x_codes, x_zero_point)
    if x_codes.shape[-1] != prepared.in_features:
        raise ValueError(f"x_codes has {x_codes.shape[-1]} features, the layer takes {prepared.in_features}")
    lead = x_codes.shape[:-1]
    return x_codes.reshape(lead.numel(), prepared.in_features).contiguous(), lead
