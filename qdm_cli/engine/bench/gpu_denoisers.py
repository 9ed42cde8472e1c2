"""Whole denoisers on one GPU: built there from their published configurations, timed in bf16, packed in place, timed again.

Random weights serve speed, structure and arithmetic only.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qdm_cli.engine.bench.denoisers import count_layers
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.models.published import CONFIGS, build_published_on
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.quant.config import ActivationPolicy, QuantizeSpec, WeightPolicy
from qdm_cli.engine.quant.grid import IntGrid, PerChannel, QParams, choose_qparams, qparams_from_range, quantize
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.state import LayerDecision, LayerState
from qdm_cli.engine.quant.state_apply import replace_
from qdm_cli.engine.runtime.choice import Choice
from qdm_cli.engine.runtime.gpu import Form
from qdm_cli.engine.runtime.gpu_blocks import fuse_gpu_blocks_
from qdm_cli.engine.runtime.graphs import Graphs, why_not
from qdm_cli.engine.runtime.modules import packed_from_state
from qdm_cli.engine.runtime.packed import PackedLayer
from qdm_cli.engine.runtime.tune import tune_

Say = Callable[[str], None]
Compiled = Literal["none", "blocks", "full"]
GATE = 1.5  # error against the same codes in float32, by that of the same codes in the float kernels of this dtype
FLOOR = 2e-3  # errors below it pass: where the dtype is float32 there is nothing to compare with


@dataclass(frozen=True)
class GpuBench:
    """What to measure.

    Attributes:
        batch: None = 2, one image under guidance, or 1 where guidance is an input (FLUX).
        steps: rows of the activation tables, all of which the timed calls go through.
        compiled: torch.compile of nothing, of the repeated blocks, or of the whole denoiser.
        compile_mode: mode of torch.compile; None = default.
        seconds: least time of each measurement.
        symmetric: weights without zero points; recipes give them some by default.
        unfused: time the packed model without fused blocks too.
    """

    bits: int = 8
    batch: int | None = None
    steps: int = 20
    compiled: Compiled = "none"
    compile_mode: str | None = None
    seconds: float = 1.0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    symmetric: bool = False
    unfused: bool = False


def inputs_on(name: str, model: nn.Module, batch: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of one call; the timestep is one number on the device, or one per image where the class wants that."""
    side = CONFIGS[name].side
    torch.manual_seed(1)
    call = example_inputs(model, CallShape(batch, batch, (side, side)), device, dtype)
    call["timestep"] = torch.full((batch,), 0.5 if name == "flux" else 500.0, device=device)
    if CONFIGS[name].class_name.startswith("UNet"):
        call["timestep"] = torch.tensor(500.0, device=device)
    return call


@torch.no_grad()
def pack_in_place_(model: nn.Module, call: dict[str, Any], bits: int, steps: int, symmetric: bool = False) -> StepContext:
    """Replace the layers of the default policy by packed ones on the model's device, one by one; ranges are those of this call."""
    weights, activations = WeightPolicy(bits=bits, symmetric=symmetric), ActivationPolicy(bits=8, timestep_aware=True)
    policy = QuantizeSpec(weights=weights, activations=activations, policy="edges-w8")
    decisions = [d for d in resolve(model, policy) if d.skipped_why is None]
    ranges = _ranges(model, call, [d.name for d in decisions if d.bits_a is not None])
    top = float(call["timestep"].max()) * 2
    step = StepContext(torch.linspace(top, 0, steps, dtype=torch.float64))
    for decision in decisions:
        layer = model.get_submodule(decision.name)
        rows = steps if decision.timestep_aware else 1
        found = None if decision.name not in ranges else _table(*ranges[decision.name], rows)
        packed = packed_from_state(_coded(layer, decision, found), layer, steps)
        packed.step = step
        replace_(model, decision.name, packed)
        packed.requires_grad_(False)
        del layer
    step.attach(model)
    return step


def _ranges(model: nn.Module, call: dict[str, Any], names: list[str]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, args: found.__setitem__(name, args[0].float().aminmax())

    handles = [model.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in names]
    model(**call, return_dict=False)
    for handle in handles:
        handle.remove()
    return found


def _coded(layer: nn.Module, decision: LayerDecision, activation: QParams | None) -> LayerState:
    """Codes of a layer's weight on the device where it lies; `calibration.code_layer` brings them to the CPU."""
    weight, grid = cast(Tensor, layer.weight).float(), IntGrid(decision.bits_w)
    params = choose_qparams(weight, grid, PerChannel(0), symmetric=decision.symmetric)
    scale, zero = (None, None) if activation is None else (activation.scale, activation.zero_point.to(torch.int8))
    bias = None if layer.bias is None else cast(Tensor, layer.bias).float()
    codes = quantize(weight, params, grid, PerChannel(0))
    return LayerState(decision, codes, params.scale, params.zero_point.to(torch.int8), bias, scale, zero)


def _table(low: Tensor, high: Tensor, rows: int) -> QParams:
    """One range for every step: the tables are there for their cost."""
    one = qparams_from_range(low, high, IntGrid(8), symmetric=False)
    return QParams(one.scale.reshape(1).repeat(rows), one.zero_point.reshape(1).repeat(rows))


@contextmanager
def in_float_arithmetic(model: nn.Module) -> Iterator[None]:
    """The same codes, multiplied by the floating-point kernels of torch: what integers are judged by."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    kept = [(layer.mode, layer.reuse, layer.form) for layer in layers]
    for layer, (_, _, form) in zip(layers, kept, strict=True):
        if form.choice.kernel == "integer":
            layer.mode, layer.reuse, layer._form = "exact", None, Form(Choice("float", "for comparison", expands=True), zero=form.zero)
    try:
        yield
    finally:
        for layer, (mode, reuse, form) in zip(layers, kept, strict=True):
            layer.mode, layer.reuse, layer._form = mode, reuse, form


@contextmanager
def in_float32(model: nn.Module, call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The parameters outside packed layers, and the arguments yielded, in float32."""
    kept = [(parameter, parameter.data) for parameter in model.parameters()]
    for parameter, value in kept:
        parameter.data = value.float()
    try:
        yield {key: _float32(value) for key, value in call.items()}
    finally:
        for parameter, value in kept:
            parameter.data = value


def _float32(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _float32(one) for key, one in value.items()}
    return value.float() if torch.is_tensor(value) and value.is_floating_point() else value


def errors_of(model: nn.Module, call: dict[str, Any], want: Tensor) -> tuple[dict[str, float], bool]:
    """Relative errors of a packed model, and whether its arithmetic is right: no further from the same codes in float32 than float kernels.

    want: what the float model answers; random weights make the error against it one of structure, not of quality.
    """
    got = model(**call, return_dict=False)[0].clone()
    with in_float_arithmetic(model):
        same = model(**call, return_dict=False)[0].clone()
        with in_float32(model, call) as whole:
            truth = model(**whole, return_dict=False)[0].clone()
    errors = {"to_float_model": _error(got, want), "to_truth": _error(got, truth), "float_kernels_to_truth": _error(same, truth)}
    return errors, errors["to_truth"] <= max(GATE * errors["float_kernels_to_truth"], FLOOR)


def kernels_of(model: Callable[..., Any], call: dict[str, Any], most: int = 14) -> list[dict[str, Any]]:
    """The kernels that take most of one eager call: name, milliseconds, launches."""
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            model(**call)
            torch.cuda.synchronize()
    except RuntimeError as error:  # a machine that lends no counters still has times
        return [{"kernel": f"not profiled: {error}"}]
    found = sorted(profile.key_averages(), key=lambda one: -one.self_device_time_total)
    return [{"kernel": one.key[:90], "ms": round(one.self_device_time_total / 1e3, 4), "launches": one.count} for one in found[:most]]


def time_calls_of(model: Callable[..., Any], call: dict[str, Any], timesteps: Tensor, seconds: float) -> dict[str, float]:
    """Wall time of calls that go through the timesteps as a sampler does, launches included, synchronised once per three calls."""
    slot = call["timestep"]

    def batch_of_calls(first: int) -> float:
        torch.cuda.synchronize()
        started = time.perf_counter()
        for i in range(3):
            slot.copy_(timesteps[(first + i) % len(timesteps)].expand_as(slot))
            model(**call)
        torch.cuda.synchronize()
        return (time.perf_counter() - started) / 3 * 1e3

    batch_of_calls(0)
    times, spent = [batch_of_calls(3)], 0.0
    while spent < seconds or len(times) < 3:
        times.append(batch_of_calls(3 * len(times)))
        spent += times[-1] * 3e-3
    return {"median_ms": median(times), "best_ms": min(times), "worst_ms": max(times), "batches_of_3": len(times)}


def captured(model: nn.Module, call: dict[str, Any]) -> tuple[Callable[..., Any], Tensor]:
    """(replay, its output): a CUDA graph of one call over the tensors of `call`, whose contents may change between replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(**call, return_dict=False)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(**call, return_dict=False)[0]
    return lambda **ignored: graph.replay(), output


@contextmanager
def _graphs(model: nn.Module, call: dict[str, Any]) -> Iterator[Callable[[], Callable[..., Any]]]:
    """How to replay a model: a packed one as its users do, with keys and values once per prompt; a float one as it is."""
    if why_not(model):
        yield lambda: captured(model, call)[0]
        return
    graphs = Graphs(model)

    def replayed() -> Callable[..., Any]:
        graphs.enable()
        model(**call)
        if not len(graphs):
            raise RuntimeError("the denoiser was not captured; its log says why")
        return model

    try:
        yield replayed
    finally:
        graphs.disable()


def _compile(model: nn.Module, bench: GpuBench) -> Callable[..., Any]:
    """A compiled view of the model: whole, or its repeated blocks in place."""
    options: dict[str, Any] = {} if bench.compile_mode is None else {"mode": bench.compile_mode}
    if bench.compiled == "full":
        return cast(Callable[..., Any], torch.compile(model, fullgraph=True, dynamic=False, **options))
    cast(Any, model).compile_repeated_blocks(fullgraph=True, dynamic=False, **options)
    return model


def _times(model: nn.Module, call: dict[str, Any], timesteps: Tensor, bench: GpuBench, say: Say) -> dict[str, Any]:
    """Times of one model, eager and as a CUDA graph."""
    with _graphs(model, call) as run:
        ways = {"eager": lambda: model, "graph": run}
        return {way: _time(way, make, call, timesteps, bench, say) for way, make in ways.items()}


def _compiled_times(model: nn.Module, call: dict[str, Any], timesteps: Tensor, bench: GpuBench, say: Say) -> dict[str, Any]:
    """The time of one model compiled; it is as before afterwards."""
    torch.compiler.reset()
    try:
        return {"compiled": _time("compiled", lambda: _compile(model, bench), call, timesteps, bench, say)}
    finally:
        for module in model.modules():  # blocks are compiled in place
            module._compiled_call_impl = None


def _time(way: str, make: Callable[[], Callable[..., Any]], call: dict[str, Any], timesteps: Tensor, bench: GpuBench, say: Say) -> Any:
    """One way to run a model; one that fails is reported with its error."""
    started = time.perf_counter()
    try:
        run = make()
        run(**call)
        torch.cuda.synchronize()
        ready = time.perf_counter() - started
        found = time_calls_of(run, call, timesteps, bench.seconds) | {"ready_s": ready}
    except Exception as error:  # a broken way must not cost the others their turn on a lent machine
        say(f"  {way}: {type(error).__name__}: {str(error)[:500]}")
        return {"error": f"{type(error).__name__}: {str(error)[:500]}"}
    say(f"  {way}: {found['median_ms']:.2f} ms ({ready:.1f} s until the first result)")
    return found


def quantized_memory(model: nn.Module) -> dict[str, float]:
    """Bytes that packed layers really hold, each storage once, by the bytes of the same weights in bf16."""
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLayer)]
    held = [tensor.untyped_storage() for layer in layers for tensor in layer.held_tensors() if not tensor.is_mkldnn]
    storages = {storage.data_ptr(): storage.nbytes() for storage in held}
    numbers = sum(layer.spec.outputs * layer.spec.terms for layer in layers)
    return {
        "quantized_weights": float(numbers),
        "quantized_bytes": float(sum(storages.values())),
        "ratio": sum(storages.values()) / (2 * numbers),
    }


def _error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@torch.no_grad()
def measure_on_gpu(name: str, bench: GpuBench, say: Say = print) -> Iterator[dict[str, Any]]:
    """Rows of one denoiser, more complete each: after bf16, after the gate, after the packed model. All of one model replace each other."""
    torch.cuda.empty_cache()
    batch = bench.batch or (1 if name == "flux" else 2)
    before = torch.cuda.memory_allocated()
    model = build_published_on(name, bench.device, bench.dtype)
    call = inputs_on(name, model, batch, bench.device, bench.dtype)
    row: dict[str, Any] = {
        "kind": "denoiser", "model": name, "batch": batch, "format": f"w{bench.bits}a8", "parameters": CONFIGS[name].parameters,
        "weights": "symmetric" if bench.symmetric else "asymmetric",
        "steps": bench.steps, "compiled": bench.compiled, "compile_mode": bench.compile_mode or "default",
        "memory": {"bf16_allocated": torch.cuda.memory_allocated() - before},
    }  # fmt: skip
    timesteps = torch.linspace(float(call["timestep"].max()) * 2, 0, bench.steps, device=bench.device)
    say(f"{name} w{bench.bits}a8 batch {batch}: bf16")
    want = model(**call, return_dict=False)[0].clone()
    row["bf16"] = _times(model, call, timesteps, bench, say)
    yield row
    call["timestep"].fill_(float(timesteps[0]) / 2)
    step = pack_in_place_(model, call, bench.bits, bench.steps, bench.symmetric)
    tune_(model, "auto")
    torch.cuda.empty_cache()
    row["memory"] |= {"packed_allocated": torch.cuda.memory_allocated() - before, **quantized_memory(model)}
    row["rows"], row["gate"] = step.rows, "failed"
    for fused in (True, False) if bench.unfused else (True,):
        call["timestep"].fill_(float(timesteps[0]) / 2)
        fuse_gpu_blocks_(model, enabled=fused)
        name_of = "qdm" if fused else "unfused"
        try:
            errors, right = errors_of(model, call, want)
        except Exception as error:  # the unfused blocks may still be right
            row[name_of] = {"eager": {"error": "".join(traceback.format_exception(error))[-1500:]}}
            say(f"  {name_of}: {row[name_of]['eager']['error']}")
            continue
        row |= {f"errors_{name_of}": errors, "layers": count_layers(model)}
        say(f"  {name_of} gate {'passed' if right else 'failed'}: {errors}; memory {row['memory']['ratio']:.3f}; {row['layers']}")
        if right:
            row["gate"] = "passed"
            row[name_of] = _times(model, call, timesteps, bench, say)
        yield row
        if right and bench.device == "cuda":
            row[f"kernels_{name_of}"] = kernels_of(model, call)
    row["ratios"] = _ratios(row)
    say(f"  ratios {row['ratios']}")
    yield row
    if bench.compiled != "none" and row["gate"] == "passed":
        row["bf16"] |= _compiled_times(build_published_on(name, bench.device, bench.dtype), call, timesteps, bench, say)
        row["ratios"] = _ratios(row)
        yield row
        fuse_gpu_blocks_(model, enabled=True)
        row["qdm"] = row.get("qdm", {}) | _compiled_times(model, call, timesteps, bench, say)
        row["ratios"] = _ratios(row)
        say(f"  ratios {row['ratios']}")
        yield row


def _ratios(row: dict[str, Any]) -> dict[str, float]:
    """Times of bf16 by times of qdm, way by way, and qdm without torch.compile against both."""
    ms = {(who, way): one["median_ms"] for who in ("bf16", "qdm", "unfused") for way, one in row.get(who, {}).items() if "median_ms" in one}
    pairs = {
        "eager": ("eager", "qdm", "eager"),
        "graph": ("graph", "qdm", "graph"),
        "graph_to_eager": ("eager", "qdm", "graph"),
        "compiled": ("compiled", "qdm", "compiled"),
        "graph_to_compiled": ("compiled", "qdm", "graph"),
        "unfused_graph": ("graph", "unfused", "graph"),
    }
    known = {name: (("bf16", base), (who, own)) for name, (base, who, own) in pairs.items()}
    return {name: round(ms[base] / ms[own], 3) for name, (base, own) in known.items() if base in ms and own in ms}
