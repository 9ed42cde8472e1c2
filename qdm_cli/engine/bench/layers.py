"""One layer as qdm runs it, beside its float baseline and its rivals: gate, times, ratios."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from qdm_cli.engine.bench.peers import peer_calls
from qdm_cli.engine.bench.roofline import Roof, expected_h100_s, roofline_s
from qdm_cli.engine.bench.shapes import LayerShape
from qdm_cli.engine.bench.timing import buffer_count, time_calls
from qdm_cli.engine.runtime.choice import Choice
from qdm_cli.engine.runtime.layer import LayerSpec
from qdm_cli.engine.runtime.modules import PackedConv2d, PackedLinear, packed_from_spec
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_kernels.conv2d_w8a8 import op as conv2d_op
from qdm_kernels.layout import pack_weight
from qdm_kernels.linear_w8a8 import op as linear_op
from qdm_kernels.quantize.op import quantize

ZERO_POINT = 5  # not 0: a kernel that forgets it must fail the gate


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        device: cpu or cuda.
        float_dtype: of activations and of the baseline: bf16 where native, else fp32.
        rounds: timed calls per candidate.
        compiled: also time the baseline and the layer under torch.compile.
        peers: also time rivals that are installed.
        profile: of denoisers, also list operators by their time.
    """

    device: str
    float_dtype: torch.dtype
    rounds: int = 20
    compiled: bool = False
    peers: bool = True
    profile: bool = False


@dataclass
class Bench:
    """Everything about one layer: packed layer, inputs x[i], and the float weight it stands for."""

    shape: LayerShape
    bits: int
    layer: PackedLayer
    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor

    def baseline(self, index: int) -> Tensor:
        x = self.inputs[index]
        if self.shape.op == "linear":
            return F.linear(x, self.weight, self.bias)
        return F.conv2d(x, self.weight, self.bias, self.shape.stride, self.shape.kernel // 2)


def make_bench(shape: LayerShape, bits: int, settings: Settings) -> Bench:
    """Gaussian weights rounded onto the whole grid of `bits`, Gaussian activations with a static scale of their own. Never zeros."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(_input_shape(shape), generator=rng)
    weight = torch.randn((shape.outputs, shape.inputs, *_sides(shape)), generator=rng)
    top = (1 << bits - 1) - 1
    scale = weight.abs().flatten(1).amax(1) / top
    codes = torch.round(weight / scale.view(-1, *[1] * (weight.ndim - 1))).to(torch.int8)
    bias = torch.randn(shape.outputs, generator=rng)
    layer = _packed(shape, bits, codes, scale, bias, float(x.abs().max()) / 127).to(settings.device)
    layer.set_mode_("auto")
    layer.place_(few_rows=shape.rows <= 16, dtype=settings.float_dtype)
    real = (codes.float() * scale.view(-1, *[1] * (weight.ndim - 1))).to(settings.device, settings.float_dtype)
    x = x.to(settings.device, settings.float_dtype)
    if shape.op == "conv2d":
        x, real = (t.contiguous(memory_format=torch.channels_last) for t in (x, real))
    count = buffer_count(x.numel() * x.element_size(), settings.device)
    inputs = [x, *(torch.roll(x, step, 0) * (1 - step / 64) for step in range(1, count))]
    inputs = [one.contiguous(memory_format=torch.channels_last) if one.ndim == 4 else one for one in inputs]
    return Bench(shape, bits, layer, inputs, real, bias.to(settings.device, settings.float_dtype))


def _input_shape(shape: LayerShape) -> tuple[int, ...]:
    if shape.op == "linear":
        return shape.rows, shape.inputs
    return shape.batch, shape.inputs, shape.side * shape.stride, shape.side * shape.stride


def _sides(shape: LayerShape) -> tuple[int, ...]:
    return (shape.kernel, shape.kernel) if shape.op == "conv2d" else ()


def _packed(shape: LayerShape, bits: int, codes: Tensor, scale: Tensor, bias: Tensor, x_scale: float) -> PackedLayer:
    spec = LayerSpec(shape.op, shape.inputs, shape.outputs, bits, bits_a=8, symmetric=True, act="static", rows=1)
    if shape.op == "conv2d":
        around = (shape.kernel // 2, shape.kernel // 2)
        fields = {"kernel": (shape.kernel, shape.kernel), "stride": (shape.stride, shape.stride), "padding": around}
        spec = LayerSpec.from_dict({**spec.to_dict(), **{key: list(value) for key, value in fields.items()}})
    layer = packed_from_spec(spec, device="cpu")
    stored = codes if codes.ndim == 2 else codes.permute(0, 2, 3, 1).flatten(1)
    values = {
        "weight": pack_weight(stored.contiguous(), bits),
        "weight_scale": scale,
        "bias": bias,
        "act_scale": torch.tensor([x_scale]),
        "act_zero_point": torch.tensor([ZERO_POINT], dtype=torch.int8),
    }
    for name, value in values.items():
        layer.load_buffer_(name, value)
    return layer


def gate(bench: Bench) -> str | None:
    """Why a layer is not timed; None = right: integers equal to float64 bit for bit, the float path close to its weight.

    Accumulators and outputs of the chosen backend are compared with the reference backend on the very shape.
    """
    layer, x = bench.layer, bench.inputs[0]
    scale, zero = layer._activation(x)
    codes = quantize(x, scale, zero, 8)
    op: Any = linear_op if isinstance(layer, PackedLinear) else conv2d_op
    run = linear_op.linear if isinstance(layer, PackedLinear) else conv2d_op.conv2d
    prepared, reference = _twin(bench, "exact").prepared, _reference(layer)
    if not torch.equal(op.accumulate(codes, zero, prepared), op.accumulate(codes, zero, reference)):
        return "integer accumulators differ from the reference"
    exact, want = run(codes, scale, zero, prepared), run(codes, scale, zero, reference)
    if x.device.type == "cpu" and not torch.equal(exact, want):
        return "outputs differ from the reference"
    error = (exact.double() - want.double()).norm() / want.double().norm()
    if not error <= 2e-3:
        return f"outputs differ from the reference by {float(error):.2g}"
    base = bench.baseline(0).double()
    drift = (layer(x).double() - base).norm() / base.norm()
    return None if drift <= 0.05 else f"the layer is {float(drift):.2g} off its float weight"


def _reference(layer: PackedLayer) -> Any:
    parts = layer.stored_parts()
    if isinstance(layer, PackedLinear):
        return linear_op.prepare(*parts, backend="reference")
    s = cast(PackedConv2d, layer).spec
    return conv2d_op.prepare(*parts, stride=s.stride, padding=s.padding, dilation=s.dilation, groups=s.groups, backend="reference")


def candidates(bench: Bench, settings: Settings) -> dict[str, Callable[[int], Any]]:
    """Calls to time. `auto`: the layer as exported models run it; `exact`: quantized arithmetic; `integer`: the same from ready codes."""
    layer, inputs = bench.layer, bench.inputs
    exact = _twin(bench, "exact")
    scale, zero = exact._activation(inputs[0])
    codes = [quantize(x, scale, zero, 8) for x in inputs]
    run: Any = linear_op.linear if isinstance(layer, PackedLinear) else conv2d_op.conv2d
    calls: dict[str, Callable[[int], Any]] = {
        "float": bench.baseline,
        "auto": lambda i: layer(inputs[i]),
        "exact": lambda i: exact(inputs[i]),
        "integer": lambda i: run(codes[i], scale, zero, exact.prepared, out_dtype=settings.float_dtype),
    }
    if settings.compiled:
        calls |= {"float_compiled": _compiled(bench.baseline), "auto_compiled": _compiled(calls["auto"])}
    if settings.peers:
        calls |= peer_calls(bench.shape, inputs, bench.weight, bench.bias, compiled=settings.compiled)
    return calls


def _twin(bench: Bench, mode: Literal["auto", "exact"]) -> PackedLayer:
    """A second layer over the same buffers."""
    twin = packed_from_spec(bench.layer.spec)
    for name, value in bench.layer.named_buffers():
        twin.load_buffer_(name, value)
    twin.set_mode_(mode)
    twin.place_(few_rows=bench.layer.few_rows, dtype=bench.layer.compute_dtype)
    return twin


def _compiled(call: Callable[[int], Any]) -> Callable[[int], Any]:
    return torch.compile(call, dynamic=False)


@torch.no_grad()
def measure(shape: LayerShape, bits: int, settings: Settings, roof: Roof) -> dict[str, Any]:
    """The JSON object of one row; a layer that fails its gate is reported as failed and not timed."""
    bench = make_bench(shape, bits, settings)
    chosen = bench.layer.choice(bench.inputs[0])
    row: dict[str, Any] = {
        "kind": "layer",
        **shape.to_dict(),
        "terms": shape.terms,
        "format": f"w{bits}a8",
        "gate": gate(bench) or "passed",
        "chosen": kernel_of(bench.layer, chosen),
        "why_not": chosen.why_not,
        "buffers": len(bench.inputs),
    }
    if row["gate"] != "passed":
        return row
    times = time_calls(candidates(bench, settings), buffers=len(bench.inputs), device=settings.device, rounds=settings.rounds)
    # exact float32 arithmetic over integers is bound by the float ceiling
    strategy = _twin(bench, "exact").prepared.strategy
    bits_at_work = None if strategy in ("fp32", "float64") else bits
    return row | {"strategy": strategy, "times": times} | _derived(shape, bits, bits_at_work, settings, roof, times)


def kernel_of(layer: PackedLayer, chosen: Choice) -> str:
    """What a layer runs: backend and strategy of its integers, `weights` for weights unpacked in the kernel, or `float`."""
    return f"{layer.prepared.backend} {layer.prepared.strategy}" if chosen.kernel == "integer" else chosen.kernel


def clock_key(device: str) -> str:
    """Which of the times to compare: medians of graph replays, the best on a CPU, where other processes take turns."""
    return "median_ms" if device.startswith("cuda") else "best_ms"


def _derived(
    shape: LayerShape, bits: int, bits_at_work: int | None, settings: Settings, roof: Roof, times: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """Ratios to the float baseline (above 1 = faster), share of the roofline, and the model's expectation for an H100."""
    key, element = clock_key(settings.device), torch.finfo(settings.float_dtype).bits // 8
    base = times["float"][key]
    result: dict[str, Any] = {"ratios": {name: base / found[key] for name, found in times.items() if name != "float"}}
    limits = {"float": roofline_s(shape, roof, None, element), "integer": roofline_s(shape, roof, bits_at_work, element)}
    result["roofline_share"] = {name: limit * 1e3 / times[name][key] for name, limit in limits.items() if limit is not None}
    kernels = {"bf16": "bf16", "quantized": "w4a8" if bits <= 4 else "w8a8"}
    result["expected_h100_us"] = {name: round(expected_h100_s(shape, kernel) * 1e6, 2) for name, kernel in kernels.items()}
    return result
