"""Range initialisation from captured trajectories (quantization spec 1.2); one resumable unit per denoising step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.diffusion.trajectories import CallRecord, TrajectoryStore, sample_tensor, take_samples
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.grid import IntGrid, PerTensor, QParams, RangeMethod, choose_qparams, param_shape, quantize
from qdm_cli.engine.quant.modules import weight_before_codes, weight_granularity
from qdm_cli.engine.quant.state import LayerDecision, LayerState, QuantState

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.methods._shared import CalibrateConfig

VALUES_PER_STEP = 8_192
"""Values kept of each layer's input at each step: 80 candidate ranges on all of them would take hours."""


@dataclass(frozen=True)
class RangeRule:
    """How a range is chosen; `percentile` is read by that method alone."""

    method: RangeMethod
    percentile: float = 99.99

    def choose(self, values: torch.Tensor, grid: IntGrid, *, symmetric: bool) -> QParams:
        return choose_qparams(values, grid, PerTensor(), symmetric=symmetric, method=self.method, percentile=self.percentile)


def range_rule(cfg: CalibrateConfig) -> RangeRule:
    """The rule behind `calibrate.method`."""
    methods: dict[str, RangeMethod] = {"minmax": "max", "mse": "mse", "percentile": "percentile"}
    name = cfg.method  # type: ignore[attr-defined]
    return RangeRule(methods[name], getattr(cfg, "percentile", 99.99))


def initialise_ranges(
    denoiser: nn.Module, cfg: CalibrateConfig, ctx: RunContext, *, decisions: list[LayerDecision], store: TrajectoryStore
) -> QuantState:
    """Quantize every weight and give every activation its range.

    Args:
        denoiser: the full-precision model, left as it was.
        decisions: of every layer, from `rules.resolve`.
        store: trajectories of the same model.

    Raises:
        GateFailed: an activation or weight is NaN or infinite; names the layer.
    """
    rule = range_rule(cfg)
    chosen = {d.name: d for d in decisions if d.skipped_why is None}
    tables = activation_tables(denoiser, chosen, store, rule, cfg.samples_per_step, ctx)
    weight_rule = RangeRule(ctx.recipe.quantize.weights.init or rule.method, rule.percentile)
    layers = {
        name: code_layer(denoiser.get_submodule(name), decision, weight_rule, tables.get(name)).cpu() for name, decision in chosen.items()
    }
    aware = any(decision.timestep_aware for decision in chosen.values())
    keys = torch.tensor(store.timesteps() if aware else [0.0], dtype=torch.float64)
    return QuantState(layers=layers, skipped=tuple(d for d in decisions if d.skipped_why), step_keys=keys)


def code_layer(
    module: nn.Module, decision: LayerDecision, rule: RangeRule, activation: QParams | None, pre_scale: torch.Tensor | None = None
) -> LayerState:
    """Integer codes and scales of one layer's weight, or of W / pre_scale, on the weight's device."""
    weight = weight_before_codes(module.weight, pre_scale)  # type: ignore[arg-type]
    grid, granularity = IntGrid(decision.bits_w), weight_granularity(decision)
    try:
        if decision.granularity == "tensor":
            params = _per_tensor(weight, decision, rule)
        else:
            params = choose_qparams(weight, grid, granularity, symmetric=decision.symmetric, method=rule.method, percentile=rule.percentile)
    except ValueError as error:
        raise GateFailed(f"The weight of {decision.name} cannot be quantized: {error}.") from error
    bias = getattr(module, "bias", None)
    return LayerState(
        decision=decision,
        codes=quantize(weight, params, grid, granularity),
        weight_scale=params.scale,
        weight_zero_point=params.zero_point.to(torch.int8),
        bias=None if bias is None else bias.detach().float().clone(),
        act_scale=None if activation is None else activation.scale,
        act_zero_point=None if activation is None else activation.zero_point.to(torch.int8),
        pre_scale=pre_scale,
    )


def _per_tensor(weight: torch.Tensor, decision: LayerDecision, rule: RangeRule) -> QParams:
    """One scale for the weight, or for each half of it, stored once per output channel."""
    grid = IntGrid(decision.bits_w)
    parts = [rule.choose(part, grid, symmetric=decision.symmetric) for part in weight.split(list(decision.input_halves), dim=1)]
    whole = QParams(torch.stack([p.scale for p in parts]), torch.stack([p.zero_point for p in parts]))
    shape = param_shape(weight.shape, weight_granularity(decision))
    return QParams(*(value.reshape(1, -1).expand(len(weight), -1).reshape(shape).clone() for value in (whole.scale, whole.zero_point)))


def parts_of(decision: LayerDecision) -> tuple[str, ...]:
    """Names under which the separately quantized parts of a layer's input are measured."""
    return (decision.name,) if decision.split is None else (f"{decision.name}@deep", f"{decision.name}@skip")


def input_parts(x: torch.Tensor, decision: LayerDecision) -> tuple[torch.Tensor, ...]:
    """The separately quantized parts of a layer's input, in the order of `parts_of`."""
    return x.split(list(decision.input_halves), dim=1 if decision.type == "Conv2d" else -1) if decision.split is not None else (x,)


def activation_tables(
    denoiser: nn.Module, chosen: dict[str, LayerDecision], store: TrajectoryStore, rule: RangeRule, samples: int, ctx: RunContext
) -> dict[str, QParams]:
    """Ranges of all static activations: [R] for timestep-aware layers, [1] for the others; [R, 2] and [1, 2] where inputs are split."""
    static = {name: d for name, d in chosen.items() if d.bits_a is not None and d.act_mode == "static"}
    if not static:
        return {}
    steps = store.timesteps()
    per_step: list[dict[str, torch.Tensor]] = []
    for row, timestep in enumerate(steps):
        unit = ctx.resume / f"ranges-{row:04d}.safetensors"
        per_step.append(_step_unit(unit, denoiser, static, store, timestep, samples, rule))
        ctx.events.progress("ranges", row + 1, len(steps))
    tables = {}
    for name, decision in static.items():
        parts = [_part_table(part, decision, per_step, rule) for part in parts_of(decision)]
        tables[name] = join_parts(parts)
    return tables


def _part_table(part: str, decision: LayerDecision, per_step: list[dict[str, torch.Tensor]], rule: RangeRule) -> QParams:
    if decision.timestep_aware:
        scale, zero = (torch.cat([unit[f"{part}:{leaf}"] for unit in per_step]) for leaf in ("scale", "zero_point"))
        return QParams(scale, zero)
    values = torch.cat([unit[f"{part}:values"] for unit in per_step])
    return _choose(rule, values, IntGrid(decision.bits_a or 8), decision)


def join_parts(parts: list[QParams]) -> QParams:
    """Tables [R] of the parts of one input as one table: [R], or [R, 2] of two."""
    if len(parts) == 1:
        return parts[0]
    return QParams(torch.stack([p.scale for p in parts], 1), torch.stack([p.zero_point for p in parts], 1))


def _step_unit(
    path: Path,
    denoiser: nn.Module,
    static: dict[str, LayerDecision],
    store: TrajectoryStore,
    timestep: float,
    samples: int,
    rule: RangeRule,
) -> dict[str, torch.Tensor]:
    """What one step contributes: scale and zero point of timestep-aware layers, a sample of the values of the others."""
    if path.exists():
        return read_tensors(path)[0]
    values = layer_inputs(denoiser, static, store, timestep, samples)
    unit: dict[str, torch.Tensor] = {}
    for name, decision in static.items():
        for part in parts_of(decision):
            if part not in values:
                raise GateFailed(f"{name} was never reached by the trajectories, so its activation range is unknown. Skip it with a rule.")
            if not bool(torch.isfinite(values[part]).all()):
                raise GateFailed(f"The input of {name} holds NaN or infinity at timestep {timestep:g}; its range cannot be measured.")
            if decision.timestep_aware:
                params = _choose(rule, values[part], IntGrid(decision.bits_a or 8), decision)
                unit |= {f"{part}:scale": params.scale, f"{part}:zero_point": params.zero_point}
            else:
                unit[f"{part}:values"] = values[part]
    write_tensors(path, unit)
    return unit


def _choose(rule: RangeRule, values: torch.Tensor, grid: IntGrid, decision: LayerDecision) -> QParams:
    params = rule.choose(values, grid, symmetric=decision.act_symmetric)
    return QParams(params.scale.reshape(1), params.zero_point.reshape(1))


def layer_inputs(
    denoiser: nn.Module, layers: dict[str, LayerDecision], store: TrajectoryStore, timestep: float, samples: int
) -> dict[str, torch.Tensor]:
    """A sample of each layer's input values at one timestep, extremes included: [<= VALUES_PER_STEP + 2] f32, by `parts_of`."""
    kept: dict[str, list[torch.Tensor]] = {}
    calls = list(calls_at(store, timestep, samples))
    rng = torch.Generator().manual_seed(int(timestep * 1000) & 0x7FFFFFFF)

    def keep(name: str, x: torch.Tensor) -> None:
        for part, values in zip(parts_of(layers[name]), input_parts(x, layers[name]), strict=True):
            kept.setdefault(part, []).append(thin(values, VALUES_PER_STEP // len(calls), rng))

    with watched_inputs(denoiser, layers, keep):
        for arguments in calls:
            run_denoiser(denoiser, arguments)
    return {name: torch.cat(parts) for name, parts in kept.items()}


def run_denoiser(denoiser: nn.Module, arguments: dict[str, Any]) -> torch.Tensor:
    """Repeat a captured call on the denoiser's device, without gradient."""
    device = next(denoiser.parameters()).device
    with torch.no_grad():
        output = denoiser(**move_arguments(arguments, device), return_dict=False)[0]
    assert isinstance(output, torch.Tensor)
    return output


def move_arguments(value: Any, device: torch.device) -> Any:
    """Tensors of nested arguments on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: move_arguments(item, device) for name, item in value.items()}
    return value


def calls_at(store: TrajectoryStore, timestep: float, samples: int) -> Iterator[dict[str, Any]]:
    """Captured calls at a timestep, cut to `samples` samples in all; both halves of a guided batch keep equal shares."""
    for record, count in records_at(store, timestep, samples):
        yield cut_call(store, record, count)


def records_at(store: TrajectoryStore, timestep: float, samples: int) -> list[tuple[CallRecord, int]]:
    """Which captured calls give how many samples, so that there are `samples` in all."""
    chosen, left = [], samples
    for record in store.at(timestep):
        if left > 0:
            chosen.append((record, min(left, record.samples)))
        left -= record.samples
    return chosen


def cut_call(store: TrajectoryStore, record: CallRecord, count: int) -> dict[str, Any]:
    """A captured call with `count` evenly spaced samples of its batch."""
    arguments = store.arguments(record)
    if record.samples == count:
        return arguments
    rows = torch.linspace(0, record.samples - 1, count).round().long()
    return take_samples(arguments, rows, int(sample_tensor(arguments).shape[0]))


def thin(x: torch.Tensor, count: int, rng: torch.Generator) -> torch.Tensor:
    """`count` random values of x and its two extremes, on the CPU in f32; all of them when there are no more."""
    flat = x.detach().float().flatten()
    if flat.numel() > count:
        picks = torch.randint(flat.numel(), (count,), generator=rng).to(flat.device)
        flat = torch.cat([flat[picks], flat.amin()[None], flat.amax()[None]])
    return flat.cpu()


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    return x


@contextmanager
def watched_inputs(denoiser: nn.Module, names: Any, on_input: Any) -> Iterator[None]:
    """Call `on_input(name, x)` with what every named layer quantizes, at each of its calls inside the block: its first argument, times
    the factors of its channels where it has some."""
    handles = []
    for name in names:
        hook = lambda module, args, name=name: on_input(name, getattr(module, "scaled_input", _as_it_is)(args[0]))  # noqa: E731
        handles.append(denoiser.get_submodule(name).register_forward_pre_hook(hook))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
