"""Linear layer on float activations and int4 weights: y = sum_k x (q - z_w) s_w + bias (README: Weight-only layers).

For layers that read more weights than they compute: few rows (time embedding, adaLN), or where memory is what counts.
Operator qdm::linear_w4a16, what `linear` is under torch.compile and torch.export.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from qdm_kernels import backend as _backend
from qdm_kernels.epilogue.reference import Epilogue
from qdm_kernels.layout import check_codes
from qdm_kernels.prepared import Prepared, flatten, integer_op, unflatten


@dataclass(frozen=True)
class PreparedWeight(Prepared):
    """A weight packed for one backend."""

    op: str  # linear_w4a16 or linear_w8a16
    backend: str
    in_features: int
    out_features: int
    bias: Tensor | None  # float32 [N]
    state: Any
    tensors: list[Tensor] = field(init=False, repr=False)  # the state as a registered operator takes it
    how: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tensors, how = flatten(self.state)
        object.__setattr__(self, "tensors", tensors)
        object.__setattr__(self, "how", f"{self.backend} {how}")


@cache
def implementation(op: str, backend: str) -> ModuleType:
    """Module that implements an op; triton's is imported when it is first asked for."""
    return import_module(f"qdm_kernels.{op}.{backend}")


@integer_op
def prepare(
    codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, *, backend: str | None = None, few_rows: bool = False
) -> PreparedWeight:
    """Pack a weight once: codes int8 [N, K] within [-8, 7], scale float32 [N] or [N, G], zero_point int like scale, bias float32 [N].

    G: groups of K / G inputs, 64 or 128 each. backend: None = `qdm_kernels.backend.choose`. few_rows: most calls have 32 rows at most;
    a GPU then keeps it
    in an order that is read as fast as its memory allows. ValueError on wrong
    shapes or dtypes, other groups, no inputs, or a backend that cannot run.
    """
    return prepare_as("linear_w4a16", 4, codes, scale, zero_point, bias, backend, few_rows)


def prepare_as(
    op: str, bits: int, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, backend: str | None, few_rows: bool
) -> PreparedWeight:
    """`prepare` for one of the two ops; errors as there."""
    _check_weight(codes, scale, zero_point, bias, bits)
    name = _backend.choose(op, device=codes.device, backend=backend)
    kept = None if bias is None else bias.detach().float()
    options = {"few_rows": few_rows} if name == "triton" else {}
    state = implementation(op, name).prepare(codes, scale.detach().float(), zero_point, **options)
    return PreparedWeight(op, name, codes.shape[1], codes.shape[0], kept, state)


@integer_op
def linear(x: Tensor, prepared: PreparedWeight, *, out_dtype: torch.dtype | None = None, **epilogue: Any) -> Tensor:
    """Apply a prepared layer: x float [..., K] -> [..., N], summed in float32.

    out_dtype: None = that of x. epilogue: activation and residual, fields of `epilogue.reference.Epilogue`. ValueError on another dtype or
    shape, or on an int8 output.
    """
    if not x.is_floating_point():
        raise ValueError(f"x is floating point, got {x.dtype}")
    end = Epilogue(out_dtype=out_dtype or (torch.float32 if x.dtype == torch.float64 else x.dtype), **epilogue)
    _check_call(x, prepared, end)
    p = prepared
    if not torch.compiler.is_compiling():
        return _run(x, p.bias, implementation(p.op, p.backend), p.state, end)
    call = getattr(torch.ops.qdm, p.op)
    return call(x, p.out_features, p.bias, p.tensors, p.how, end.activation, end.residual, end.out_dtype)


def register(op: str) -> None:
    """Register qdm::`op` with its fake. x float [..., K] -> [..., outputs]; state, how: `PreparedWeight.tensors` and `.how`."""

    @torch.library.custom_op(f"qdm::{op}", mutates_args=())
    def operator(
        x: Tensor, outputs: int, bias: Tensor | None, state: list[Tensor], how: str, activation: str, residual: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        backend, _, text = how.partition(" ")
        home = implementation(op, backend)
        return _run(x, bias, home, unflatten(state, text, home), Epilogue(activation, residual, out_dtype))

    @operator.register_fake
    def _(
        x: Tensor, outputs: int, bias: Tensor | None, state: list[Tensor], how: str, activation: str, residual: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        return x.new_empty((*x.shape[:-1], outputs), dtype=out_dtype)


register("linear_w4a16")


def _run(x: Tensor, bias: Tensor | None, home: ModuleType, state: Any, end: Epilogue) -> Tensor:
    lead = x.shape[:-1]
    rows = x.reshape(lead.numel(), x.shape[-1]).contiguous()
    if end.residual is not None:
        end = replace(end, residual=end.residual.reshape(len(rows), state.outputs))
    return home.linear(rows, bias, state, end).reshape(*lead, state.outputs)


def _check_weight(codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, bits: int) -> None:
    if codes.dim() != 2 or 0 in codes.shape:
        raise ValueError(f"weight codes are int8 [N, K], at least one of each, got {tuple(codes.shape)}")
    check_codes(codes, bits)
    n, k = codes.shape
    groups = 1 if scale.dim() == 1 else scale.shape[-1]
    if tuple(scale.shape) not in ((n,), (n, groups)) or (scale.dim() == 2 and k not in (64 * groups, 128 * groups)):
        raise ValueError(f"weight scale is [{n}], or [{n}, G] with groups of 64 or 128 inputs, got {tuple(scale.shape)} for {k} inputs")
    if zero_point.is_floating_point() or zero_point.shape != scale.shape:
        raise ValueError(f"weight zero_point is an integer tensor {tuple(scale.shape)}, got {zero_point.dtype} {tuple(zero_point.shape)}")
    if bias is not None and tuple(bias.shape) != (n,):
        raise ValueError(f"weight bias has one entry per output, [{n}], got {tuple(bias.shape)}")


def _check_call(x: Tensor, prepared: PreparedWeight, end: Epilogue) -> None:
    end.check()
    if end.out_dtype == torch.int8:
        raise ValueError("a weight-only layer has a float output, got torch.int8")
    if x.dim() == 0 or x.shape[-1] != prepared.in_features:
        raise ValueError(f"x is [..., {prepared.in_features}], got {tuple(x.shape)}")
    shape = (*x.shape[:-1], prepared.out_features)
    if end.residual is not None and end.residual.shape != shape:
        raise ValueError(f"residual has the output's shape, {shape}, got {tuple(end.residual.shape)}")
