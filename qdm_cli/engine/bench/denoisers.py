"""Whole denoisers built from their published configurations with seeded random weights: speed and structure, no images."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, cast

import psutil
import torch
from torch import Tensor, nn

from qdm_cli.engine.bench.layers import Settings, clock_key
from qdm_cli.engine.bench.profile import operator_times
from qdm_cli.engine.bench.timing import time_calls
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.published import CONFIGS, build_published, build_published_on
from qdm_cli.engine.plan.inputs import CallShape, example_inputs
from qdm_cli.engine.quant.config import ActivationPolicy, QuantizeSpec, WeightPolicy
from qdm_cli.engine.quant.grid import IntGrid, QParams, choose_qparams, qparams_from_range
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState
from qdm_cli.engine.runtime.modules import pack_denoiser_
from qdm_cli.engine.runtime.packed import PackedLayer

Say = Callable[[str], None]
MEMORY_FACTOR = 2.7  # float model, its packed copy, and layers of it that run in floating point


def _silent(line: str) -> None:
    pass


def quantized_state(denoiser: nn.Module, call: dict[str, Any], bits: int) -> QuantState:
    """Min-max codes of the recipes' default, with zero points, at `bits` weight bits, and activation ranges of one forward."""
    policy = QuantizeSpec(weights=WeightPolicy(bits=bits), activations=ActivationPolicy(bits=8), policy="edges-w8")
    decisions = [d for d in resolve(denoiser, policy) if d.skipped_why is None]
    ranges: dict[str, QParams] = {}

    def keeper(name: str) -> Callable[[nn.Module, Any], None]:
        def keep(module: nn.Module, args: Any) -> None:
            one = choose_qparams(args[0].float(), IntGrid(8))
            ranges[name] = QParams(one.scale.reshape(1).cpu(), one.zero_point.reshape(1).cpu())

        return keep

    static = [d.name for d in decisions if d.bits_a is not None]
    handles = [denoiser.get_submodule(name).register_forward_pre_hook(keeper(name)) for name in static]
    denoiser(**call)
    for handle in handles:
        handle.remove()
    return QuantState({d.name: _coded(denoiser.get_submodule(d.name), d, ranges.get(d.name)) for d in decisions})


def _coded(layer: nn.Module, decision: LayerDecision, inputs: QParams | None) -> LayerState:
    """Codes of one layer by the smallest and the largest weight of each output: what calibration's `max` gives, in few passes."""
    weight, grid = cast(Tensor, layer.weight).detach().float(), IntGrid(decision.bits_w)
    flat = weight.flatten(1)
    params = qparams_from_range(flat.amin(1), flat.amax(1), grid, symmetric=decision.symmetric)
    scale, zero = params.scale, params.zero_point
    codes = (flat / scale[:, None]).round_().add_(zero[:, None]).clamp_(grid.lo, grid.hi).to(torch.int8).view(weight.shape)
    zero, bias = zero.to(torch.int8), cast(Tensor | None, layer.bias)
    bias = None if bias is None else bias.detach().float()
    if inputs is None:
        return LayerState(decision, codes, scale, zero, bias)
    return LayerState(decision, codes, scale, zero, bias, inputs.scale.float(), inputs.zero_point.to(torch.int8))


def packed_twin(name: str, denoiser: nn.Module, state: QuantState) -> nn.Module:
    """The packed form of a denoiser of `CONFIGS[name]`, which shares with it whatever is not quantized."""
    with torch.device("meta"):
        twin = build_published(name).eval().requires_grad_(False)
    pack_denoiser_(twin, state, mode="auto")
    for path, value in [*twin.named_parameters(), *twin.named_buffers()]:
        if value.device.type == "meta":
            parent, _, leaf = path.rpartition(".")
            setattr(twin.get_submodule(parent), leaf, denoiser.get_submodule(parent).__getattr__(leaf))
    return twin


def seeded_inputs(denoiser: nn.Module, batch: int, side: int) -> dict[str, Any]:
    """Keyword arguments of one call, the same on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return example_inputs(denoiser, CallShape(batch, batch, (side, side)), "cpu")


def memory_problem(name: str, device: str) -> str | None:
    """Why the denoiser does not fit here; None = it does."""
    entry = CONFIGS[name]
    element = 2 if device.startswith("cuda") else 4
    need = entry.parameters * element * MEMORY_FACTOR
    free = torch.cuda.mem_get_info()[0] if device.startswith("cuda") else psutil.virtual_memory().available
    return None if need <= free else f"needs about {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"


@torch.no_grad()
def measure_denoiser(name: str, bits: int, settings: Settings, *, batch: int = 2, say: Say = _silent) -> dict[str, Any]:
    """The JSON object of one denoiser; one that does not fit in memory is reported as skipped. say: takes a line after each part.

    The relative error is of this forward, random weights and ranges of this very input: a check of arithmetic, not of quality.

    Raises:
        InputError: no such configuration.
    """
    if name not in CONFIGS:
        raise InputError(f"{name}: no published configuration; one of {', '.join(CONFIGS)}")
    row: dict[str, Any] = {
        "kind": "denoiser",
        "model": name,
        "batch": batch,
        "format": f"w{bits}a8",
        "parameters": CONFIGS[name].parameters,
    }
    cpu = settings.device == "cpu"  # where every call of the gate was a warm-up
    if problem := memory_problem(name, settings.device):
        return row | {"gate": "skipped", "why": problem}
    denoiser = build_published_on(name, "cpu", torch.float32)
    call = seeded_inputs(denoiser, batch, CONFIGS[name].side)
    say(f"{name}: built")
    packed = packed_twin(name, denoiser, quantized_state(denoiser, call, bits))
    say(f"{name}: packed")
    models = {"float": denoiser.to(settings.device, memory_format=torch.channels_last), "auto": packed.to(settings.device)}
    calls, error = _calls(models, call, settings)
    say(f"{name}: relative error {error:.3f}")
    row |= {"gate": "passed" if error < 0.5 else "failed", "relative_error": error, "layers": count_layers(packed)}
    if row["gate"] == "failed":
        return row
    seen = lambda who, seconds: say(f"{name} {row['format']} {who}: {seconds * 1e3:.0f} ms")  # noqa: E731
    times = time_calls(calls, buffers=1, device=settings.device, rounds=settings.rounds, warm_up=0 if cpu else 1, seen=seen)
    base = times["float"][clock_key(settings.device)]
    if settings.profile:
        ours = [name for name in calls if name.startswith("auto")]
        row["profile"] = {name: operator_times(partial(calls[name], 0), device=settings.device) for name in ours}
    return row | {"times": times, "ratios": {key: base / one[clock_key(settings.device)] for key, one in times.items() if key != "float"}}


def _calls(models: dict[str, nn.Module], call: dict[str, Any], settings: Settings) -> tuple[dict[str, Callable[[int], Any]], float]:
    """Timed calls, the float baseline also in bf16 where that is native, and the relative error of the packed one."""
    call = {key: value.to(settings.device) if isinstance(value, torch.Tensor) else value for key, value in call.items()}
    want, got = (models[name](**call, return_dict=False)[0].float() for name in ("float", "auto"))
    calls = {name: _caller(model, call) for name, model in models.items()}
    if settings.compiled:
        calls |= {f"{name}_compiled": _caller(torch.compile(model), call) for name, model in models.items()}
    if settings.float_dtype == torch.bfloat16:
        half = copy.deepcopy(models["float"]).bfloat16()
        short = {key: value.bfloat16() if torch.is_tensor(value) and value.is_floating_point() else value for key, value in call.items()}
        calls |= {"bf16": _caller(half, short), "auto_bf16": _caller(models["auto"], short)}
    return calls, float((got - want).norm() / want.norm())


def _caller(model: Callable[..., Any], call: dict[str, Any]) -> Callable[[int], Any]:
    return lambda i: model(**call)


def count_layers(denoiser: nn.Module) -> dict[str, Any]:
    """How many packed layers run integers, and the reasons of the others with their numbers; after the first forward."""
    chosen = [choice for layer in denoiser.modules() if isinstance(layer, PackedLayer) for choice in layer.choices()]
    reasons: dict[str, int] = {}
    for choice in chosen:
        if choice.why_not:
            reasons[choice.why_not] = reasons.get(choice.why_not, 0) + 1
    return {
        "integer": sum(choice.kernel == "integer" for choice in chosen),
        "float": len(chosen) - sum(c.kernel == "integer" for c in chosen),
        "why_not": reasons,
    }
