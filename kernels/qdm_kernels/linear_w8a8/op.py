"""Linear layer on integer codes: y = float(sum_k (x - z_x)(w - z_w)) * (s_x * s_w) + bias (README: Arithmetic contract).

Operator qdm::linear_w8a8: what `linear` is under torch.compile and torch.export. In eager mode `linear` calls the backend directly.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.epilogue.reference import Epilogue, finish
from qdm_kernels.exact import check_int32
from qdm_kernels.native.tiles import STRATEGIES
from qdm_kernels.prepared import Prepared, check_activation, check_place, check_weight, flatten, integer_op, unflatten
from qdm_kernels.quantize.reference import pick


@dataclass(frozen=True)
class PreparedLinear(Prepared):
    """A weight packed for one backend. strategy: how it computes; reason: why not by the fastest kernel of the device, None = it does."""

    op: str  # linear_w8a8 or linear_w4a8
    backend: str
    in_features: int
    out_features: int
    scale: Tensor  # float32 [N]
    bias: Tensor | None  # float32 [N]
    state: Any
    refused: str | None = None  # why the triton backend does not take this layer
    tensors: list[Tensor] = field(init=False, repr=False)  # the state as a registered operator takes it
    how: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors, how = flatten(self.state)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "how", f"{self.backend} {how}")

    @property
    def strategy(self) -> str:
        """`triton`, `amx`, `vnni`, `avx2`, `onednn`, `fp32` or `float64`."""
        return self.state.strategy

    @property
    def reason(self) -> str | None:
        """Why the Triton or the oneDNN int8 kernel was passed over."""
        return self.refused or self.state.reason


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """Module that implements an op; triton's is imported when it is first asked for."""
    return import_module(f"qdm_kernels.{op}.{backend}")


@integer_op
def prepare(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, backend: str | None = None) -> PreparedLinear:
    """Pack a weight once: codes int8 [N, K], scale float32 [N], zero_point int [N], bias float32 [N] or None.

    4-bit weights come as plain codes (-8..7). backend: None = `qdm_kernels.backend.choose`, and the next best where the triton kernel
    refuses the layer (`reason`). ValueError on wrong shapes or dtypes, no inputs, a backend that cannot run, or a layer whose
    accumulator could overflow int32.
    """
    return prepare_as("linear_w8a8", codes, scale, zero_point, bias, backend)


def prepare_as(op: str, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, backend: str | None) -> PreparedLinear:
    """`prepare` for one of the two ops; errors as there."""
    check_weight(codes, scale, zero_point, bias, dim=2)
    if codes.shape[1] == 0:
        raise ValueError(f"a layer has at least one input, got weight codes {tuple(codes.shape)}")
    check_int32(codes, zero_point)
    n, k = codes.shape
    name, refused = _backend.choose(op, device=codes.device, backend=backend), None
    if name == "triton" and (refused := implementation(op, name).why_not(k)):
        if backend == "triton":
            raise ValueError(f"backend 'triton' cannot run this {op}: {refused}")
        name = _backend.choose(op, device=codes.device, without="triton")
    kept = [None if value is None else value.detach().float() for value in (scale, bias)]
    return PreparedLinear(op, name, k, n, kept[0], kept[1], implementation(op, name).prepare(codes, zero_point), refused)


@integer_op
def linear(
    x_codes: Tensor, x_scale: Tensor, x_zero_point: Tensor, prepared: PreparedLinear, *, step: Tensor | None = None, **epilogue: Any
) -> Tensor:
    """Apply a prepared layer: x_codes int8 [..., K] -> float32 [..., N], with `geglu` [..., N / 2], bit-identical on every backend.

    x_scale: float32, one element, or [..., 1] per token; x_zero_point: int, one element. step: int32 [1]; x_scale and x_zero_point
    are then tables, [S] or one element, and this is their row. epilogue: activation, residual, out_dtype, out_scale, out_zero_point,
    fields of `epilogue.reference.Epilogue`. A layer that `reads_unsigned` also takes uint8 codes, shifted by +128. ValueError on another
    dtype or shape.
    """
    end = Epilogue(step=step, **epilogue)
    _check_call(x_codes, x_zero_point, prepared, end)
    p = prepared
    if not torch.compiler.is_compiling():
        return _run(x_codes, x_scale, x_zero_point, p.scale, p.bias, implementation(p.op, p.backend), p.state, end)
    return getattr(torch.ops.qdm, p.op)(
        x_codes, x_scale, x_zero_point, p.scale, p.bias, p.tensors, p.how, step,
        end.activation, end.residual, end.out_dtype, end.out_scale, end.out_zero_point,
    )  # fmt: skip


def register(op: str) -> None:
    """Register qdm::`op` with its fake. x int8 [..., K] -> [..., N]; state, how: `PreparedLinear.tensors` and `.how`."""

    @torch.library.custom_op(f"qdm::{op}", mutates_args=())
    def operator(
        x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
        step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype, out_scale: Tensor | None,
        out_zero_point: Tensor | None,
    ) -> Tensor:  # fmt: skip
        end = Epilogue(activation, residual, out_dtype, out_scale, out_zero_point, step)
        backend, _, text = how.partition(" ")
        home = implementation(op, backend)
        return _run(x, x_scale, x_zero_point, w_scale, bias, home, unflatten(state, text, home), end)

    @operator.register_fake
    def _(
        x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
        step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype, out_scale: Tensor | None,
        out_zero_point: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return x.new_empty((*x.shape[:-1], Epilogue(activation).width(w_scale.shape[-1])), dtype=out_dtype)


register("linear_w8a8")


def _run(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, home: ModuleType, state: Any, end: Epilogue
) -> Tensor:
    """One call on a backend's module: triton finishes inside its kernel, the others after it."""
    if end.step is None and x_scale.numel() != 1:
        x_scale = x_scale.expand(*x.shape[:-1], 1).reshape(-1, 1)
    if state.strategy == "triton":
        return home.linear(x, x_scale if x_scale.dtype == torch.float32 else x_scale.float(), x_zero_point, w_scale, bias, state, end)
    shape, rows = (*x.shape[:-1], w_scale.shape[-1]), _rows(x)
    s, z = pick(x_scale, end.step).float(), pick(x_zero_point, end.step)
    scale = s.reshape(()) if s.numel() == 1 else s
    if state.strategy in STRATEGIES and end.residual is not None and end.only_adds:
        residual = end.residual.reshape(-1, shape[-1]).contiguous()
        return home.linear(rows, scale, z, w_scale, bias, state, end.out_dtype, residual).reshape(shape)
    direct = (end.out_dtype,) if state.strategy in (*STRATEGIES, "onednn") and end.only_casts else ()
    y = home.linear(rows, scale, z, w_scale, bias, state, *direct)
    return finish(y.reshape(shape), end)


@integer_op
def accumulate(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear) -> Tensor:
    """Exact integer part: sum_k (x - z_x)(w - z_w), x_codes int8 [..., K] -> int32 [..., N]. Errors as `linear`."""
    _check_call(x_codes, x_zero_point, prepared, Epilogue())
    sums = implementation(prepared.op, prepared.backend).accumulate(_rows(x_codes), x_zero_point, prepared.state)
    return sums.reshape(*x_codes.shape[:-1], prepared.out_features)


def _check_call(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedLinear, end: Epilogue) -> None:
    end.check(gated=prepared.out_features)
    check_activation(x_codes, x_zero_point, table=end.step is not None, unsigned=prepared.reads_unsigned)
    check_place(x_codes, prepared.scale, end.residual)
    if x_codes.shape[-1] != prepared.in_features:
        raise ValueError(f"x_codes has {x_codes.shape[-1]} features, the layer takes {prepared.in_features}")
    shape = (*x_codes.shape[:-1], end.width(prepared.out_features))
    if end.residual is not None and end.residual.shape != shape:
        raise ValueError(f"residual has the output's shape, {shape}, got {tuple(end.residual.shape)}")


def _rows(x_codes: Tensor) -> Tensor:
    return x_codes.reshape(x_codes.shape[:-1].numel(), x_codes.shape[-1]).contiguous()
