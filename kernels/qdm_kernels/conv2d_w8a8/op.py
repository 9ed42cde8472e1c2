"""2-D convolution on integer codes: y = float(sum (x - z_x)(w - z_w)) * (s_x * s_w) + bias (README: Arithmetic contract).

Operators qdm::conv2d_w8a8 and qdm::conv2d_w4a8: what `conv2d` is under torch.compile and torch.export. In eager mode `conv2d` calls the
backend directly.
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
from qdm_kernels.geometry import Conv2dGeometry, Pair
from qdm_kernels.native.tiles import STRATEGIES
from qdm_kernels.prepared import Prepared, check_activation, check_place, check_weight, flatten, integer_op, unflatten
from qdm_kernels.quantize.reference import pick


@dataclass(frozen=True)
class PreparedConv2d(Prepared):
    """A weight packed for one backend. strategy: how it computes; reason: why not by the fastest kernel of the device, None = it does."""

    op: str  # conv2d_w8a8 or conv2d_w4a8
    backend: str
    in_channels: int
    out_channels: int
    kernel: Pair
    scale: Tensor  # float32 [O, 1, 1]
    bias: Tensor | None  # float32 [O, 1, 1]
    geometry: Conv2dGeometry
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
        """`triton`, `amx`, `vnni`, `avx2`, `winograd`, `onednn`, `fp32` or `float64`."""
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
    """Pack a weight once: codes int8 [O, I / groups, kh, kw], scale float32 [O], zero_point int [O], bias float32 [O] or None.

    padding_end: padding below and to the right; None = as `padding`. backend: None = `qdm_kernels.backend.choose`, and the next best
    where the triton kernel refuses the layer (`reason`). ValueError on wrong shapes or dtypes, a backend that cannot run, or a layer
    whose accumulator could overflow int32.
    """
    geometry = Conv2dGeometry(stride, padding, dilation, groups, padding_end)
    return prepare_as("conv2d_w8a8", codes, scale, zero_point, bias, geometry, backend)


def prepare_as(
    op: str, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None, geometry: Conv2dGeometry, backend: str | None
) -> PreparedConv2d:
    """`prepare` for one of the two ops; errors as there."""
    check_weight(codes, scale, zero_point, bias, dim=4)
    check_int32(codes, zero_point)
    if codes.shape[0] % geometry.groups:
        raise ValueError(f"{codes.shape[0]} filters do not divide into {geometry.groups} groups")
    channels = codes.shape[1] * geometry.groups
    name, refused = _backend.choose(op, device=codes.device, backend=backend), None
    if name == "triton":
        refused = implementation(op, name).why_not(channels, geometry)
        if refused and backend == "triton":
            raise ValueError(f"backend 'triton' cannot run this {op}: {refused}")
        name = _backend.choose(op, device=codes.device, without="triton") if refused else name
    state = implementation(op, name).prepare(codes, zero_point, geometry)
    values = [None if value is None else value.detach().float().view(-1, 1, 1) for value in (scale, bias)]
    outputs, _, kh, kw = codes.shape
    return PreparedConv2d(op, name, channels, outputs, (kh, kw), values[0], values[1], geometry, state, refused)


@integer_op
def conv2d(
    x_codes: Tensor, x_scale: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d, *, step: Tensor | None = None, **epilogue: Any
) -> Tensor:
    """Apply a prepared layer: x_codes int8 [B, I, H, W] -> float32 [B, O, H', W'] channels_last, bit-identical on every backend.

    A padded pixel is real 0, the code x_zero_point. x_scale: float32, one element, or [B, 1, 1, 1] per image; x_zero_point: int, one
    element. step: int32 [1]; x_scale and x_zero_point are then tables, [S] or one element, and this is their row. epilogue: fields of
    `epilogue.reference.Epilogue`. A layer that `reads_unsigned` also takes uint8 codes, shifted by +128. ValueError on another dtype or
    shape.
    """
    end = Epilogue(step=step, **epilogue)
    check_call(x_codes, x_zero_point, prepared, end)
    p = prepared
    if not torch.compiler.is_compiling():
        return run(x_codes, x_scale, x_zero_point, p.scale, p.bias, implementation(p.op, p.backend), p.state, end)
    return getattr(torch.ops.qdm, p.op)(
        x_codes, x_scale, x_zero_point, p.scale, p.bias, p.tensors, p.how, list(output_shape(x_codes, p)), step,
        end.activation, end.residual, end.out_dtype, end.out_scale, end.out_zero_point,
    )  # fmt: skip


def register(op: str) -> None:
    """Register qdm::`op` with its fake. x int8 [B, I, H, W] -> `shape`; state, how: `PreparedConv2d.tensors` and `.how`."""

    @torch.library.custom_op(f"qdm::{op}", mutates_args=())
    def operator(
        x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
        shape: list[int], step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype,
        out_scale: Tensor | None, out_zero_point: Tensor | None,
    ) -> Tensor:  # fmt: skip
        end = Epilogue(activation, residual, out_dtype, out_scale, out_zero_point, step)
        backend, _, text = how.partition(" ")
        home = implementation(op, backend)
        return run(x, x_scale, x_zero_point, w_scale, bias, home, unflatten(state, text, home), end)

    @operator.register_fake
    def _(
        x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, state: list[Tensor], how: str,
        shape: list[int], step: Tensor | None, activation: str, residual: Tensor | None, out_dtype: torch.dtype,
        out_scale: Tensor | None, out_zero_point: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return torch.empty(shape, dtype=out_dtype, device=x.device, memory_format=torch.channels_last)


register("conv2d_w8a8")


def run(
    x: Tensor, x_scale: Tensor, x_zero_point: Tensor, w_scale: Tensor, bias: Tensor | None, home: ModuleType, state: Any, end: Epilogue
) -> Tensor:
    """One call on a backend's module: triton finishes inside its kernel, the others after it."""
    if state.strategy == "triton":
        return home.conv2d(x, x_scale if x_scale.dtype == torch.float32 else x_scale.float(), x_zero_point, w_scale, bias, state, end)
    x = x.contiguous(memory_format=torch.channels_last)
    s, z = pick(x_scale, end.step).float(), pick(x_zero_point, end.step)
    scale = s.reshape(()) if s.numel() == 1 else s
    if state.strategy in STRATEGIES and end.residual is not None and end.only_adds:
        residual = end.residual.contiguous(memory_format=torch.channels_last)
        return home.conv2d(x, scale, z, w_scale, bias, state, end.out_dtype, residual)
    direct = (end.out_dtype,) if state.strategy in (*STRATEGIES, "onednn") and end.only_casts else ()
    y = home.conv2d(x, scale, z, w_scale, bias, state, *direct)
    return finish(y, end).contiguous(memory_format=torch.channels_last)


@integer_op
def accumulate(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d) -> Tensor:
    """Exact integer part: sum (x - z_x)(w - z_w), x_codes int8 [B, I, H, W] -> int32 [B, O, H', W']. Errors as `conv2d`."""
    check_call(x_codes, x_zero_point, prepared, Epilogue())
    x = x_codes.contiguous(memory_format=torch.channels_last)
    return implementation(prepared.op, prepared.backend).accumulate(x, x_zero_point, prepared.state)


def output_shape(x_codes: Tensor, prepared: PreparedConv2d) -> tuple[int, int, int, int]:
    """[B, O, H', W'] of a call."""
    b, _, h, w = x_codes.shape
    return b, prepared.out_channels, *prepared.geometry.output_size((h, w), prepared.kernel)


def check_call(x_codes: Tensor, x_zero_point: Tensor, prepared: PreparedConv2d, end: Epilogue) -> None:
    """ValueError unless activation, step and residual fit the layer."""
    end.check()
    check_activation(x_codes, x_zero_point, table=end.step is not None, unsigned=prepared.reads_unsigned)
    check_place(x_codes, prepared.scale, end.residual)
    if x_codes.dim() != 4 or x_codes.shape[1] != prepared.in_channels:
        raise ValueError(f"x_codes is [B, {prepared.in_channels}, H, W], got {tuple(x_codes.shape)}")
    shape = output_shape(x_codes, prepared)
    if end.residual is not None and end.residual.shape != shape:
        raise ValueError(f"residual has the output's shape, {shape}, got {tuple(end.residual.shape)}")
