"""Linear layer on integer codes: y = float(sum_k (x - z_x)(w - z_w)) * (s_x * s_w) + bias (README: Arithmetic contract).

Operator qdm::linear_w8a8: what `linear` is under torch.compile and torch.export. In eager mode `linear` calls the backend directly.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.exact import check_int32, subtract_zero_point
from qdm_kernels.linear_w8a8 import cpu, reference
from qdm_kernels.prepared import Prepared, check_activation, check_weight, flatten, integer_op, unflatten
from qdm_kernels.quantize.reference import pick

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
    tensors: list[Tensor] = field(init=False, repr=False)  # the state as a registered operator takes it
    how: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors, how = flatten(self.state)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "how", f"{self.backend} {how}")

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
def linear(
    x_codes: Tensor, x_scale: Tensor, x_zero_point: Tensor, prepared: PreparedLinear, *, step: Tensor | None = None, **epilogue: Any
) -> Tensor:
    """Apply a prepared layer: x_codes int8 [..., K] -> float32 [..., N], bit-identical on every backend.

    x_scale: float32, one element, or [..., 1] per token; x_zero_point: int, one element. step: int32 [1]; x_scale and x_zero_point
    are then tables, [S] or one element, and this is their row. epilogue: activation, residual, out_dtype, out_scale, out_zero_point,
    fields of `epilogue.reference.Epilogue`. ValueError on another dtype or shape.
    """
    end = Epilogue(step=step, **epilogue)
    _check_call(x_codes, x_zero_point, prepared, end)
    p = prepared
    if not torch.compiler.is_compiling():
        return _linear(x_codes, x_scale, x_zero_point, p.scale, p.bias, p.backend, p.state, end)
    return torch.ops.qdm.linear_w8a8(
        x_codes, x_scale, x_zero_point, p.scale, p.bias, p.tensors, p.how, step,
        end.activation, end.residual, end.out_dtype, end.out_scale, end.out_zero_point,
    )  # fmt: skip


@torch.library.custom_op("qdm::linear_w8a8", mutates_args=())
def _operator(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
    step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype, out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    """x int8 [..., K] -> [..., N]. state, how: `PreparedLinear.tensors` and `.how`; the rest as in `linear`."""
    backend, _, text = how.partition(" ")
    end = Epilogue(activation, residual, out_dtype, out_scale, out_zero_point, step)
    return _linear(x, x_scale, x_zero_point, w_scale, bias, backend, unflatten(state, text, _IMPLEMENTATIONS[backend]), end)


@_operator.register_fake
def _(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
    step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype, out_scale: Tensor | None,
    out_zero_point: Tensor | None,
) -> Tensor:  # fmt: skip
    return x.new_empty((*x.shape[:-1], w_scale.shape[-1]), dtype=out_dtype)


def _linear(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, backend: str, state: Any, end: Epilogue
) -> Tensor:
    lead = x.shape[:-1]
    x_scale, x_zero_point = pick(x_scale, end.step), pick(x_zero_point, end.step)
    s = x_scale.reshape(()) if x_scale.numel() == 1 else x_scale.expand(*lead, 1).reshape(-1, 1)
    y = _IMPLEMENTATIONS[backend].linear(_rows(x), s.float(), x_zero_point, w_scale, bias, state)
    return finish(y.reshape(*lead, w_scale.shape[-1]), end)


@integer_op
def accumulate(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear) -> Tensor:
    """Exact integer part: sum_k (x - z_x)(w - z_w), x_codes int8 [..., K] -> int32 [..., N]. Errors as `linear`."""
    _check_call(x_codes, x_zero_point, prepared, Epilogue())
    sums = _IMPLEMENTATIONS[prepared.backend].accumulate(_rows(x_codes), x_zero_point, prepared.state)
    return sums.reshape(*x_codes.shape[:-1], prepared.out_features)


def _check_call(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear, end: Epilogue) -> None:
    end.check()
    check_activation(x_codes, x_zero_point, table=end.step is not None)
    if x_codes.shape[-1] != prepared.in_features:
        raise ValueError(f"x_codes has {x_codes.shape[-1]} features, the layer takes {prepared.in_features}")
    if end.residual is not None and end.residual.shape != (*x_codes.shape[:-1], prepared.out_features):
        raise ValueError(
            f"residual has the output's shape, {(*x_codes.shape[:-1], prepared.out_features)}, got {tuple(end.residual.shape)}"
        )


def _rows(x_codes: Tensor) -> Tensor:
    return x_codes.reshape(x_codes.shape[:-1].numel(), x_codes.shape[-1]).contiguous()
