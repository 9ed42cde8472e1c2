"""How packed layers run on CUDA GPUs: one stored form per layer, made when the layer reaches the GPU, and no wait for the GPU in a call.

A form is chosen once, from the layer and its place in the denoiser, never from the sizes of a call: so that nothing is unpacked, and
nothing allocated twice, once a graph is being captured or compiled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from qdm_cli.engine.runtime.choice import FEW_ROWS, MANY_ROWS, Case, Choice, Machine, choose, say_once, widest_codes
from qdm_kernels.conv2d_w4a8 import op as conv2d_w4a8
from qdm_kernels.conv2d_w8a8 import op as conv2d_w8a8
from qdm_kernels.linear_w4a8 import op as linear_w4a8
from qdm_kernels.linear_w4a16 import op as linear_w4a16
from qdm_kernels.linear_w8a8 import op as linear_w8a8
from qdm_kernels.linear_w8a16 import op as linear_w8a16
from qdm_kernels.quantize.op import quantize, quantize_per_token

if TYPE_CHECKING:
    from qdm_cli.engine.runtime.packed import PackedLayer

FEW_ROW_ROLES = ("time_embedding", "time_projection", "class_embedding", "modulation")  # one row per image
_OUTPUTS = (torch.bfloat16, torch.float16, torch.float32, torch.int8)


@dataclass(frozen=True)
class Form:
    """What a layer holds on its GPU.

    Attributes:
        choice: and why.
        prepared: of the op that runs; None = the dequantized weight.
        zero: int32 [1], 0: the zero point of symmetric activations.
        weight, bias: of layers in floating point, in their dtype; None = dequantized in every call.
    """

    choice: Choice
    prepared: Any = None
    zero: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def backend(self) -> str | None:
        """Of the op that runs, where it is that of quantizers as well; None = theirs to choose."""
        return "triton" if self.prepared is not None and self.prepared.backend == "triton" else None


@dataclass(frozen=True)
class Activation:
    """Codes int8 with what turns them back: scale float32, zero point int, and the step that indexes both where they are tables."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    step: Tensor | None


def is_gpu(device: torch.device) -> bool:
    """Are layers on `device` served by this module?"""
    return device.type == "cuda"


def possible() -> bool:
    """May layers of this process come to a GPU?"""
    return torch.cuda.is_available()


@torch.no_grad()
def make_form(layer: PackedLayer) -> Form:
    """Choose and lay out the weight of a layer that lies on a GPU; its codes and the kernel's become one allocation."""
    spec, device = layer.spec, layer.weight.device
    case = Case(spec, FEW_ROWS if layer.few_rows else MANY_ROWS, Machine.of(device, layer.op), *widest_codes(spec))
    choice = choose(case, layer.mode)
    if choice.why_not is not None:
        say_once(choice)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    if choice.kernel == "float":
        if layer.mode == "exact" or choice.expands or layer.compute_dtype is None:
            return Form(choice, zero=zero)
        return Form(choice, None, zero, *expanded(layer, layer.compute_dtype))
    parts = layer.stored_parts()
    if choice.kernel == "weights":
        return Form(choice, (linear_w4a16 if spec.bits_w <= 4 else linear_w8a16).prepare(*parts, few_rows=layer.few_rows), zero)
    prepared = prepare_integers(layer, *parts)
    _share_storage_(layer, prepared)
    return Form(choice, prepared, zero)


def prepare_integers(layer: PackedLayer, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Any:
    """Weights for the integer op; at most 4 bits stay two to a byte."""
    s, small = layer.spec, layer.spec.bits_w <= 4
    if s.kind == "linear":
        return (linear_w4a8 if small else linear_w8a8).prepare(codes, scale, zero_point, bias)
    where: dict[str, Any] = {"stride": s.stride, "padding": s.padding, "dilation": s.dilation, "groups": s.groups}
    return (conv2d_w4a8 if small else conv2d_w8a8).prepare(codes, scale, zero_point, bias, **where)


def expanded(layer: PackedLayer, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Dequantized weight, convolutions in channels_last as they are stored, and bias. Symmetric 8-bit codes take one pass over memory."""
    spec, bias = layer.spec, layer._buffers["bias"]
    bias = None if bias is None else bias.to(dtype)
    if spec.bits_w <= 4 or not spec.symmetric or spec.group is not None:
        weight = layer.coded_weight().to(dtype)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight, bias
    if torch.compiler.is_compiling():
        flat = (layer.weight * layer.weight_scale[:, None]).to(dtype)
    else:
        flat = torch.mul(layer.weight, layer.weight_scale[:, None], out=torch.empty_like(layer.weight, dtype=dtype))
    if spec.kind == "linear":
        return flat, bias
    outputs, inputs, *kernel = spec.weight_shape
    return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2), bias


def _share_storage_(layer: PackedLayer, prepared: Any) -> None:
    """Let the layer's stored codes be a view of the kernel's operand where the bytes agree: all but channels that are no multiple of 64."""
    own, weight = layer.weight, getattr(prepared.state, "weight", None)
    rows = None if weight is None else weight.flatten(1)[: len(own)]
    if rows is not None and rows.shape == own.shape and rows.dtype == own.dtype and torch.equal(rows, own):
        layer._buffers["weight"] = rows


@torch.no_grad()
def join(layers: Sequence[PackedLayer]) -> Any:
    """One operand for layers that read the same codes; each goes on with its own rows of it. None = apart, or no integers."""
    if any(layer.form.choice.kernel != "integer" for layer in layers):
        return None
    parts = [layer.stored_parts() for layer in layers]
    codes, scales, zeros, biases = zip(*parts, strict=True)
    bias = None if biases[0] is None else torch.cat(biases)
    joint = prepare_integers(layers[0], torch.cat(codes), torch.cat(scales), torch.cat(zeros), bias)
    if joint.backend != "triton":
        return None
    rows_of = joint.state.weight.split([layer.spec.outputs for layer in layers])
    for layer, rows, zero in zip(layers, rows_of, zeros, strict=True):
        own = layer.form.prepared  # alone it may have folded its zero points into a weight that these rows, plain codes, are not
        centre = None if joint.state.centre is None else zero.to(torch.int32)
        layer._form = replace(layer.form, prepared=replace(own, state=replace(own.state, weight=rows, centre=centre)))
        _share_storage_(layer, layer._form.prepared)
    return joint


def forward(layer: PackedLayer, x: Tensor) -> Tensor:
    """A packed layer on its GPU: x float -> the same dtype, or the layer's own int8 codes (`runtime.fused`) -> the denoiser's dtype.

    Raises:
        ValueError: x lies on another device.
    """
    place = cast(Tensor, layer._buffers["weight"]).device
    if x.device != place:
        raise ValueError(f"the input is on {x.device}, the layer on {place}: move one of them")
    form = layer._form or layer.form
    if form.choice.kernel == "float":
        if form.weight is not None and form.weight.dtype == x.dtype:
            return layer._apply_op(x, form.weight, form.bias)
        return layer._float_forward(x) if layer.mode == "exact" else layer._apply_op(x, *expanded(layer, x.dtype))
    if form.choice.kernel == "weights":
        return linear_w4a16.linear(x, form.prepared).to(x.dtype)
    if layer.reuse is not None:
        return layer.reuse.output(layer, x, layer._quantized_forward)
    return layer._quantized_forward(x)


def product(layer: PackedLayer, x: Tensor, prepared: Any) -> Tensor | None:
    """Outputs of an integer layer, or of several `prepared` together; None when samples have zero points of their own."""
    a = activation(layer, x)
    return None if a is None else multiply(layer, a, prepared, output_dtype(layer, x))


def output_dtype(layer: PackedLayer, x: Tensor) -> torch.dtype:
    """That of x, or of the denoiser where x is codes."""
    return x.dtype if x.is_floating_point() else layer.compute_dtype or torch.float32


def multiply(layer: PackedLayer, a: Activation, prepared: Any, dtype: torch.dtype, **epilogue: Any) -> Tensor:
    """Codes times weights, finished by the kernel: scales, bias, `epilogue`, and the cast to `dtype`."""
    run: Any = linear_w8a8.linear if layer.spec.kind == "linear" else conv2d_w8a8.conv2d
    if dtype in _OUTPUTS:
        return run(a.codes, a.scale, a.zero_point, prepared, step=a.step, out_dtype=dtype, **epilogue)
    return run(a.codes, a.scale, a.zero_point, prepared, step=a.step, out_dtype=torch.float32, **epilogue).to(dtype)


def activation(layer: PackedLayer, x: Tensor) -> Activation | None:
    """Codes of x; None when samples or tokens have zero points of their own, for which kernels have no form."""
    spec, form = layer.spec, layer._form or layer.form
    bits, zero = cast(int, spec.bits_a), cast(Tensor, form.zero)
    if x.dtype == torch.int8:
        return Activation(x, *cast(Any, tables(layer, x.device)))
    if spec.act == "dynamic" and spec.act_symmetric and spec.kind == "linear":
        codes, scale = quantize_per_token(x, bits)
        return Activation(codes, scale, zero, None)
    found = tables(layer, x.device)
    if found is None:
        scale, picked = layer._activation(x)
        if picked.numel() != 1:
            return None
        found = scale, picked.reshape(()), None
    scale, zero, step = found
    return Activation(quantize(x, scale, zero, bits, step, backend=form.backend), scale, zero, step)


def tables(layer: PackedLayer, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """(scale, zero point, step) of a static layer as kernels take them: one entry, or tables with a step on the device.

    None = measured in the call, or rows that kernels cannot index: of each sample, or between two.
    """
    if layer.spec.act != "static":
        return None
    scale, zero = cast(Tensor, layer._buffers["act_scale"]), layer._buffers["act_zero_point"]
    zero = cast(Tensor, (layer._form or layer.form).zero) if zero is None else zero
    if scale.numel() == 1 and zero.numel() == 1:
        return scale, zero, None
    row = layer.step.row
    return None if row is None or row.device != device else (scale, zero, row)
