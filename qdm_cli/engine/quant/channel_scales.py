"""Timestep-channel reparameterization (TCR; TCAQ-DM, AAAI 2025, arXiv 2412.16700): Y = (W r)(X / r), one static r [C] per layer.

m[t, c] = max |X[t, :, c]|,    a_c = sum_t w_t m[t, c] / sum_t w_t with w_t = max_c m[t, c],    r = (a / geomean(a))^alpha

An interpretation: the paper's own normalisation is not known here (quantization spec 5.1). r evens out the ranges of the input channels,
so that one activation scale fits them all, and moves the unevenness into the weight, whose scales per output channel bear less of it the
fewer their bits; alpha says how much is moved. A layer stores 1/r as `pre_scale`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import Arguments, timestep_of
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import VALUES_PER_STEP, RangeRule, code_layer, run_denoiser, thin, watched_inputs
from qdm_cli.engine.quant.grid import IntGrid, QParams
from qdm_cli.engine.quant.modules import CodedWeight, build_layer
from qdm_cli.engine.quant.state import LayerDecision
from qdm_cli.engine.quant.state_apply import scales_of

Inputs = list[tuple[float, torch.Tensor]]
"""(timestep, x [n, ...]) pairs of one layer."""
SMALLEST_SHARE = 1e-3
"""A channel counts as at least this share of the largest one: a dead channel would get an unbounded factor."""


@dataclass(frozen=True)
class FactorSettings:
    """How factors are chosen.

    Attributes:
        alphas: candidates per layer, chosen by the error of the layer's output; one candidate is taken as it is.
        kinds: layers that may have factors: `Conv2d` alone (the paper), or `Linear` too.
        samples: inputs per step that the error is measured on.
        memory: bytes of layer inputs held at a time; layers that do not fit together are measured one pass after the other.
        weight_rule, activation_rule: how ranges start.
    """

    alphas: tuple[float, ...]
    kinds: tuple[str, ...]
    samples: int
    memory: int
    weight_rule: RangeRule
    activation_rule: RangeRule


def channel_maxima(denoiser: nn.Module, layers: dict[str, LayerDecision], calls: Iterable[Arguments]) -> dict[str, torch.Tensor]:
    """Largest |input| of every channel at every timestep: [T, C] f32 per layer.

    Raises:
        GateFailed: NaN or infinity; names the layer.
    """
    seen: dict[str, dict[float, torch.Tensor]] = {name: {} for name in layers}
    timestep = 0.0

    def note(name: str, x: torch.Tensor) -> None:
        largest = _channels_last(x, layers[name]).abs().amax(0).float().cpu()
        if not bool(torch.isfinite(largest).all()):
            raise GateFailed(f"The input of {name} holds NaN or infinity at timestep {timestep:g}; its channels cannot be measured.")
        known = seen[name].get(timestep)
        seen[name][timestep] = largest if known is None else torch.maximum(known, largest)

    for arguments in calls:
        timestep = timestep_of(arguments)
        with watched_inputs(denoiser, layers, note):
            run_denoiser(denoiser, arguments)
    if missing := [name for name, steps in seen.items() if not steps]:
        raise GateFailed(f"{missing[0]} was never reached by the trajectories, so its channels are unknown. Skip it with a rule.")
    return {name: torch.stack(list(steps.values())) for name, steps in seen.items()}


def weighted_maxima(maxima: torch.Tensor) -> torch.Tensor:
    """a [C] from m [T, C]: steps with large values count more."""
    weights = maxima.amax(1, keepdim=True)
    return (maxima * weights).sum(0) / weights.sum().clamp_min(1e-30)


def channel_factors(maxima: torch.Tensor, alpha: float) -> torch.Tensor | None:
    """1/r [C] of a layer with m [T, C]; None = 1, for alpha 0 or an input that is zero."""
    a = weighted_maxima(maxima).double()
    if alpha == 0 or float(a.max()) == 0:
        return None
    a = a.clamp_min(SMALLEST_SHARE * float(a.max()))
    return (a.log() - a.log().mean()).mul(-alpha).exp().float()


def may_have_factors(decision: LayerDecision, module: nn.Module, kinds: tuple[str, ...]) -> bool:
    """Quantized inputs, in one part and one group of channels."""
    whole = decision.split is None and getattr(module, "groups", 1) == 1
    return decision.skipped_why is None and decision.bits_a is not None and whole and decision.type in kinds


def choose_factors(
    denoiser: nn.Module, chosen: dict[str, LayerDecision], settings: FactorSettings, calls: list[Arguments]
) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, float]]]:
    """(factors by layer, figures by layer).

    Args:
        chosen: quantized layers.
        calls: what the full-precision denoiser is run on; every step that deployment visits should be among them.
    """
    layers = {name: d for name, d in chosen.items() if may_have_factors(d, denoiser.get_submodule(name), settings.kinds)}
    maxima = channel_maxima(denoiser, layers, calls)
    if len(settings.alphas) == 1:
        fixed = {name: channel_factors(value, settings.alphas[0]) for name, value in maxima.items()}
        return {name: value for name, value in fixed.items() if value is not None}, {}
    factors, figures = {}, {}
    for inputs in _inputs_in_groups(denoiser, layers, settings, calls):
        for name, parts in inputs.items():
            tried = {alpha: channel_factors(maxima[name], alpha) for alpha in settings.alphas}
            errors = {a: layer_error(denoiser.get_submodule(name), layers[name], value, parts, settings) for a, value in tried.items()}
            best = min(errors, key=lambda alpha: (errors[alpha], alpha))
            figures[name] = {"alpha": best, "error": errors[best], "error_without": errors.get(0.0, float("nan"))}
            if (value := tried[best]) is not None:
                factors[name] = value
    return factors, figures


def _inputs_in_groups(
    denoiser: nn.Module, layers: dict[str, LayerDecision], settings: FactorSettings, calls: list[Arguments]
) -> Iterator[dict[str, Inputs]]:
    """A few inputs per call of as many layers as fit into `memory` (one at least), group after group."""
    sizes = {name: _bytes(inputs) for name, inputs in _inputs(denoiser, layers, settings.samples, calls[:1]).items()}
    waiting = list(layers)
    while waiting:
        group: list[str] = []
        while waiting and (not group or sum(sizes[name] for name in [*group, waiting[0]]) * len(calls) <= settings.memory):
            group.append(waiting.pop(0))
        yield _inputs(denoiser, group, settings.samples, calls)


def _inputs(denoiser: nn.Module, names: Iterable[str], samples: int, calls: Iterable[Arguments]) -> dict[str, Inputs]:
    """(timestep, x [<= samples, ...] f32) of every call, per layer."""
    kept: dict[str, Inputs] = {}
    timestep = 0.0

    def keep(name: str, x: torch.Tensor) -> None:
        kept.setdefault(name, []).append((timestep, x[:samples].detach().float().clone()))

    for arguments in calls:
        timestep = timestep_of(arguments)
        with watched_inputs(denoiser, names, keep):
            run_denoiser(denoiser, arguments)
    return kept


def _bytes(inputs: Inputs) -> int:
    return sum(x.numel() * x.element_size() for _, x in inputs)


def layer_error(
    original: nn.Module,
    decision: LayerDecision,
    factors: torch.Tensor | None,
    inputs: Inputs,
    settings: FactorSettings,
) -> float:
    """Relative squared error of a layer's output with quantized weight and input.

    Args:
        inputs: (timestep, x) pairs; a timestep-aware layer takes the ranges of each timestep's own values.
    """
    state = code_layer(original, replace(decision, pre_scale=factors is not None), settings.weight_rule, None, factors).cpu()
    groups = _by_timestep(inputs) if decision.timestep_aware else [torch.cat([x for _, x in inputs])]
    error = signal = 0.0
    for x in groups:
        if decision.act_mode == "static":
            params = _range_of(x, decision, factors, settings.activation_rule)
            state = replace(state, act_scale=params.scale.reshape(1), act_zero_point=params.zero_point.reshape(1).to(torch.int8))
        layer = build_layer(
            original, state.decision, CodedWeight(state), state.bias, scales_of(state), StepContext(), state.own_factors
        ).to(x.device)
        with torch.no_grad():
            want = original(x)
            error += float((layer(x) - want).double().square().sum())
            signal += float(want.double().square().sum())
    return error / max(signal, 1e-30)


def _range_of(x: torch.Tensor, decision: LayerDecision, factors: torch.Tensor | None, rule: RangeRule) -> QParams:
    shape = (-1, 1, 1) if decision.type == "Conv2d" else (-1,)
    scaled = x if factors is None else x * factors.to(x.device).reshape(shape)
    values = thin(scaled, VALUES_PER_STEP, torch.Generator().manual_seed(0))
    return rule.choose(values, IntGrid(decision.bits_a or 8), symmetric=decision.act_symmetric)


def _by_timestep(inputs: Inputs) -> list[torch.Tensor]:
    groups: dict[float, list[torch.Tensor]] = {}
    for timestep, x in inputs:
        groups.setdefault(timestep, []).append(x)
    return [torch.cat(group) for group in groups.values()]


def _channels_last(x: torch.Tensor, decision: LayerDecision) -> torch.Tensor:
    """[N, C]: one row per position."""
    return x.movedim(1, -1).flatten(0, -2) if decision.type == "Conv2d" else x.flatten(0, -2)
