"""What every layer on stored integer codes holds and chooses: buffers, the layout of a backend, the arithmetic of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.quant.grid import IntGrid, PerChannel, PerGroup, broadcast, centred_codes
from qdm_cli.engine.quant.modules import dynamic_qparams, per_input
from qdm_cli.engine.runtime import gpu, plain
from qdm_cli.engine.runtime.choice import Case, Choice, Machine, Mode, choose, code_ranges, say_once
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.reuse import PerPrompt, SharedInput
from qdm_kernels.conv2d_w8a8 import cpu as conv2d_cpu
from qdm_kernels.layout import unpack_weight
from qdm_kernels.linear_w8a8 import cpu as linear_cpu
from qdm_kernels.native import producers, tiles
from qdm_kernels.native.producers import Grid
from qdm_kernels.quantize.cpu import quantize_for
from qdm_kernels.quantize.op import quantize

_TORCH_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32}
BUFFERS = ("weight", "weight_scale", "weight_zero_point", "bias", "act_scale", "act_zero_point", "pre_scale")


@dataclass(frozen=True)
class Gated:
    """A gated layer for `native.tiles`, its outputs interleaved; packed: None = it does not fit."""

    packed: tiles.Packed | None
    scale: Tensor
    bias: Tensor | None


class PackedLayer(nn.Module):
    """Shared part of PackedLinear and PackedConv2d.

    Buffers (None where `spec.tensors()` has no such entry): weight, packed codes; weight_scale f32 [O] or [O, G]; weight_zero_point int8;
    bias f32 [O]; act_scale f32 [R]; act_zero_point int8 [R]; pre_scale f32 [I], by which the input is multiplied first.
    """

    op = ""  # name of the qdm_kernels op
    weight: Tensor
    weight_scale: Tensor
    _prepared: Any
    _row_sums: Tensor | None
    _floats: Tensor | None
    _plain: Tensor | None
    _constant: bool | None
    _form: gpu.Form | None
    _halves: tuple[Any, Any] | None
    _choices: dict[tuple[str, int], Choice]
    _grids: dict[int, Grid]
    _scales: dict[tuple[int, Grid], tuple[Any, Tensor, Tensor | None]]  # operand, scale of outputs, bias, by the operand's id and grid
    _gated: Gated | None
    _operands: dict[plain.Key, plain.Operands]  # of inputs met in floating point

    def __init__(self, spec: LayerSpec, *, device: str | torch.device = "meta"):
        super().__init__()
        self.spec = spec
        self.step = StepContext()
        self.mode: Mode = "exact"
        self.reuse: PerPrompt | SharedInput | None = None
        self.turn = 0  # place among the layers that share an input
        self.few_rows = False  # at most one row per image
        self.compute_dtype: torch.dtype | None = None  # of the denoiser's activations; None = not known
        self._forget_()
        table = spec.tensors()
        for name in BUFFERS:
            entry = table.get(name)
            self.register_buffer(name, None if entry is None else torch.zeros(entry[1], dtype=_TORCH_DTYPES[entry[0]], device=device))

    def forward(self, x: Tensor, *unused: object) -> Tensor:
        """x: float, [..., K] or [B, I, H, W] -> the same dtype. `unused`: diffusers passes a LoRA scale to some layers."""
        if (y := plain.known(self, x)) is not None:
            return y
        factors = self._buffers["pre_scale"]
        return (
            self._forward(x)
            if factors is None or x.dtype == torch.int8
            else self._forward(x.float() * self._per_output(factors)).to(x.dtype)
        )

    def _forward(self, x: Tensor) -> Tensor:
        """The layer on an input whose channels have their factors."""
        if gpu.is_gpu(cast(Tensor, self._buffers["weight"]).device):
            return gpu.forward(self, x)
        if self.choice(x).kernel == "float":
            if self.mode == "exact":
                return self._float_forward(x)
            compute = partial(plain.forward, self)
            return self.reuse.output(self, x, compute) if isinstance(self.reuse, PerPrompt) else compute(x)
        if self.reuse is not None:
            return self.reuse.output(self, x, self._quantized_forward)
        return self._quantized_forward(x)

    def _quantized_forward(self, x: Tensor) -> Tensor:
        if gpu.is_gpu(x.device) and (y := gpu.product(self, x, self.prepared)) is not None:
            return y
        scale, zero_point = self._activation(x)
        if zero_point.numel() == 1:
            return self._integer_forward(x, scale, zero_point).to(x.dtype)
        return self._forward_by_zero_point(x, scale, zero_point).to(x.dtype)

    def choice(self, x: Tensor) -> Choice:
        """Integer or float arithmetic for an input of this size, decided once per power of two of rows."""
        if gpu.is_gpu(x.device):
            return self.form.choice
        bucket = (x.device.type, self._rows(x).bit_length())
        if bucket not in self._choices:
            case = Case(
                self.spec,
                1 << bucket[1],
                Machine.of(x.device, self.op),
                *code_ranges(self.weight, self._buffers["weight_zero_point"], self.spec),
            )
            self._choices[bucket] = choose(case, self.mode)
            if self._choices[bucket].kernel == "float":
                say_once(self._choices[bucket])
        return self._choices[bucket]

    def choices(self) -> list[Choice]:
        """What was chosen so far, one per size seen; one for all sizes on a GPU."""
        return list(self._choices.values()) if self._form is None else [self._form.choice]

    def set_mode_(self, mode: Mode) -> None:
        """`exact`: quantized arithmetic always; `auto`: where it is not slower than the dequantized weight."""
        if mode != self.mode:
            self.mode = mode
            self._forget_()

    def place_(self, *, few_rows: bool, dtype: torch.dtype | None) -> None:
        """Say where in its denoiser the layer stands: whether it sees one row per image, and what dtype the activations have."""
        if (few_rows, dtype) != (self.few_rows, self.compute_dtype):
            self.few_rows, self.compute_dtype = few_rows, dtype
            self._forget_()

    def codes(self) -> Tensor:
        """int8 codes in the weight's own shape."""
        spec = self.spec
        flat = unpack_weight(self.weight, spec.bits_w, (spec.outputs, spec.terms))
        if spec.kind == "linear":
            return flat
        outputs, inputs, *kernel = spec.weight_shape
        # clone, not contiguous(): a 1x1 kernel would keep strides that make convolutions choose channels_last
        return flat.view(outputs, *kernel, inputs).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)

    def centred_weight(self) -> Tensor:
        """codes - zero point as f32, the weight's own shape."""
        codes = self.codes().float()
        zero = self._buffers["weight_zero_point"]
        return codes if zero is None else codes - self._per_weight(zero.float())

    def coded_weight(self) -> Tensor:
        """f32 weight that the codes stand for."""
        return self.centred_weight() * self._per_weight(self.weight_scale)

    def dequantized_weight(self) -> Tensor:
        """f32 weight that the layer multiplies its input with, quantization error included."""
        weight, factors = self.coded_weight(), self._buffers["pre_scale"]
        return weight if factors is None else weight * per_input(factors, weight)

    @property
    def prepared(self) -> Any:
        """The weight in the layout of the chosen backend, made once."""
        if gpu.is_gpu(cast(Tensor, self._buffers["weight"]).device):
            return (self._form or self.form).prepared
        if self._prepared is None:
            self._prepared = self._prepare(*self.stored_parts())
        return self._prepared

    @property
    def form(self) -> gpu.Form:
        """What the layer holds on its GPU, made once."""
        if self._form is None:
            self._form = gpu.make_form(self)
        return self._form

    def stored_parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(codes, scale, zero point, bias) as the kernels' `prepare` takes them."""
        zero = self._buffers["weight_zero_point"]
        zero = torch.zeros_like(self.weight_scale, dtype=torch.int8) if zero is None else zero
        return self.codes(), self.weight_scale, zero, self._buffers["bias"]

    @property
    def float_weight(self) -> Tensor:
        """f32 operand of layers without an integer kernel, expanded once: unpacking takes longer than a small layer's product.

        A GPU, whose memory is scarcer, expands it in every call.
        """
        if self._floats is None or self._floats.device != self.weight.device:
            made = self.centred_weight() if self.spec.group is None else self.coded_weight()
            if self.weight.device.type != "cpu":
                return made
            self._floats = made
        return self._floats

    @property
    def row_sums(self) -> Tensor:
        """Sum of (codes - zero point) per output: int32 [O]."""
        if self._row_sums is None:
            self._row_sums = self.centred_weight().flatten(1).sum(1).to(torch.int32)
        return self._row_sums

    def plain_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantized weight for layers that run in floating point, expanded once."""
        if self._plain is None or self._plain.dtype != dtype:
            weight = self.coded_weight().to(dtype)
            self._plain = weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight
        return self._plain

    @property
    def same_every_step(self) -> bool:
        """Does no denoising step change the activation's scale or zero point?"""
        if self._constant is None:
            tables = [self._buffers[name] for name in ("act_scale", "act_zero_point")]
            self._constant = all(table is None or bool((table == table[0]).all()) for table in tables)
        return self._constant

    def held_tensors(self) -> list[Tensor]:
        """Whatever the layer keeps in memory; several may share a storage."""
        form = self._form
        extra = [] if form is None else [form.weight, form.bias, form.zero, *(form.prepared.tensors if form.prepared else ())]
        extra += [held for operands in self._operands.values() for held in operands]
        return [held for held in [*self.buffers(), *extra, self._plain, self._floats, self._row_sums] if held is not None]

    def load_buffer_(self, name: str, value: Tensor) -> None:
        """Take a stored tensor; float ones are kept in f32 whatever they were stored in.

        Raises:
            ValueError: another shape, or integers where floats belong.
        """
        own = self._buffers[name]
        if own is None or tuple(own.shape) != tuple(value.shape) or own.is_floating_point() != value.is_floating_point():
            has = "none" if own is None else f"{own.dtype} {tuple(own.shape)}"
            raise ValueError(f"{name}: stored as {value.dtype} {tuple(value.shape)}, the layer has {has}")
        self._buffers[name] = value.detach().to(own.dtype)
        self._forget_()

    def extra_repr(self) -> str:
        s = self.spec
        return f"{s.inputs}, {s.outputs}, w{s.bits_w}a{s.bits_a or 'float'}, rows={s.rows}"

    def _activation(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scale f32 and zero point int32 of this call: 0-dim, or broadcastable against x (per sample or per token)."""
        spec = self.spec
        if spec.act == "dynamic":
            grid, per_token = IntGrid(cast(int, spec.bits_a)), spec.kind == "linear"
            scale, zero = dynamic_qparams(x.float(), grid, symmetric=spec.act_symmetric, per_token=per_token)
            return scale, torch.zeros((), dtype=torch.int32, device=x.device) if spec.act_symmetric else zero.to(torch.int32)
        scale = self.step.pick(cast(Tensor, self._buffers["act_scale"]))
        table = self._buffers["act_zero_point"]
        if table is None:
            return _per_sample(scale, x.ndim), torch.zeros((), dtype=torch.int32, device=x.device)
        if self.step.mode == "nearest" or len(table) == 1:
            zero = self.step.pick(table).to(torch.int32)
        else:  # between two rows a zero point is interpolated, then rounded
            zero = torch.round(self.step.pick(table.float())).to(torch.int32)
        return _per_sample(scale, x.ndim), _per_sample(zero, x.ndim)

    def grid(self) -> Grid | None:
        """Scale and zero point of this call as numbers, read once per row; None = not static, not one for all, or not on a CPU."""
        index = self.step.index
        if self.spec.act != "static" or index is None or self.weight.device.type != "cpu":
            return None
        if index not in self._grids:
            scale, zero = (self._buffers[name] for name in ("act_scale", "act_zero_point"))
            at = 0 if scale is None or len(scale) == 1 else index
            number = 0 if zero is None else int(zero[0 if len(zero) == 1 else index])
            self._grids[index] = Grid(float(cast(Tensor, scale)[at].reciprocal()), number, cast(int, self.spec.bits_a))
        return self._grids[index]

    def through_tiles(
        self, x: Tensor, prepared: Any, *, affine: tuple[Tensor, Tensor] | None = None, silu: bool = False, gain: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor | None:  # fmt: skip
        """Output + residual for silu(x * factor + offset) * gain, quantized on its way into `native.tiles`, as x; None = not here."""
        tiled = prepared.backend == "cpu" and prepared.strategy in tiles.STRATEGIES
        if not tiled or torch.compiler.is_compiling() or not producers.takes(x):
            return None
        home: Any = conv2d_cpu if self.spec.kind == "conv2d" else linear_cpu
        if (grid := self.grid()) is None or (home is conv2d_cpu and not conv2d_cpu.reads_floats(prepared.state, x)):
            return None
        if (key := (id(prepared), grid)) not in self._scales:
            bias = None if prepared.bias is None else prepared.bias.flatten()
            self._scales[key] = prepared, (prepared.scale * self._activation(x)[0]).flatten(), bias
        return home.from_floats(x, tiles.Source(grid, affine, silu, gain), *self._scales[key][1:], prepared.state, residual)

    def codes_for(self, x: Tensor, scale: Tensor, zero_point: Tensor, prepared: Any) -> Tensor:
        """Codes of x for a weight prepared here: int8, or uint8 shifted by +128 where oneDNN reads them."""
        bits = cast(int, self.spec.bits_a)
        if prepared.backend == "cpu" and not torch.compiler.is_compiling():
            return quantize_for(x, scale, zero_point, bits, self.grid(), prepared.code_dtype)
        return quantize(x, scale, zero_point, bits)

    def _float_forward(self, x: Tensor) -> Tensor:
        """The same sums on float hardware: weight-only layers, group scales, and devices without an integer kernel."""
        with torch.autocast(x.device.type, enabled=False):
            if x.device.type != "cpu" and x.dtype in (torch.float16, torch.bfloat16):
                return self._half_forward(x)
            centred, x_scale = x.float(), None
            if self.spec.bits_a is not None:
                x_scale, zero = self._activation(x)
                centred = centred_codes(centred, x_scale, zero.float(), IntGrid(self.spec.bits_a))
            if self.spec.group is not None:
                y = self._apply_op(centred, self.float_weight)
                y = y if x_scale is None else y * x_scale
            else:
                scale = self._per_output(self.weight_scale)
                y = self._apply_op(centred, self.float_weight) * (scale if x_scale is None else x_scale * scale)
            bias = self._buffers["bias"]
            return (y if bias is None else y + self._per_output(bias)).to(x.dtype)

    def _half_forward(self, x: Tensor) -> Tensor:
        """Half precision cannot hold sums of centred codes: both operands are scaled first."""
        restored = x
        if self.spec.bits_a is not None:
            scale, zero = self._activation(x)
            restored = (centred_codes(x.float(), scale, zero.float(), IntGrid(self.spec.bits_a)) * scale).to(x.dtype)
        return self._apply_op(restored, *gpu.expanded(self, x.dtype))

    def _per_weight(self, value: Tensor) -> Tensor:
        granularity = PerChannel(0) if self.spec.group is None else PerGroup(self.spec.group)
        return broadcast(value, self.spec.weight_shape, granularity)

    def _forward_by_zero_point(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Samples with zero points of their own, one at a time: the kernels take one zero point per call."""
        scale = scale.expand(len(x), *scale.shape[1:])
        rows = [self._integer_forward(x[i : i + 1], scale[i : i + 1], zero_point[i : i + 1]) for i in range(len(x))]
        return torch.cat(rows)

    def _prepare(self, codes: Tensor, scale: Tensor, zero_point: Tensor, bias: Tensor | None) -> Any:
        raise NotImplementedError

    def _integer_forward(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply_op(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        raise NotImplementedError

    def _apply_plain(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return self._apply_op(x, weight, bias)

    def _rows(self, x: Tensor) -> int:
        raise NotImplementedError

    def _per_output(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> PackedLayer:
        """Moves between devices move everything; casts leave the f32 scales alone."""

        def move(tensor: Tensor) -> Tensor:
            if not tensor.is_floating_point() or tensor.device.type == "meta":
                return fn(tensor)
            return tensor.to(fn(tensor[:0]).device)

        self._forget_()
        super()._apply(move, recurse)
        self.settle_()
        return self

    def settle_(self) -> None:
        """On a GPU, make what calls need now: a graph under capture or compilation cannot."""
        if gpu.is_gpu(self.weight.device):
            self.step.place_(self.weight.device)
            self.form  # noqa: B018
            if isinstance(self.reuse, SharedInput):
                self.reuse.settle_()

    @property
    def settled(self) -> bool:
        """Has it what calls on a GPU need?"""
        return self._form is not None

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._forget_()
        super()._load_from_state_dict(*args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """A copy makes its own backend layout: oneDNN's packed tensors cannot be copied."""
        made_here = dict.fromkeys(("_prepared", "_row_sums", "_floats", "_plain", "_constant", "_form", "_halves", "_gated", "reuse"))
        return {**self.__dict__, **made_here, "_choices": {}, "_grids": {}, "_scales": {}, "_operands": {}}

    def _forget_(self) -> None:
        self._prepared = self._row_sums = self._floats = self._plain = self._constant = self._form = self._halves = self._gated = None
        self._choices, self._grids, self._scales, self._operands = {}, {}, {}, {}
        if self.reuse is not None:
            self.reuse.forget_()


def _per_sample(value: Tensor, ndim: int) -> Tensor:
    return value if value.ndim == 0 else value.reshape(-1, *([1] * (ndim - 1)))
