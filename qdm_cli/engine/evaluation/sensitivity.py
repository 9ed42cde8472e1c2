"""Measuring `calibrate.sensitivity`: errors of weight, output and final image per layer and width (interface spec 7).

fast costs one pass over a few captured calls per width; end_to_end samples once per layer and width. A width of the first and a layer
of the second is one resumable unit. Memory beyond the model: its weights once more, in float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.artifact import write_json
from qdm_cli.engine.diffusion.prompts import prompts_for
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
from qdm_cli.engine.evaluation.subject import weight_of
from qdm_cli.engine.evaluation.trace import ErrorSum, weight_sqnr_db
from qdm_cli.engine.quant.calibration import RangeRule, calls_at, code_layer, run_denoiser
from qdm_cli.engine.quant.grid import IntGrid, RangeMethod, choose_qparams, fake_quantize
from qdm_cli.engine.quant.modules import CodedWeight, QuantizedLayer, build_layer
from qdm_cli.engine.quant.sensitivity import LayerErrors, Sensitivity, WidthErrors
from qdm_cli.engine.quant.state import LayerDecision
from qdm_cli.engine.quant.state_apply import replace_

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.models import LoadedPipeline

TIMESTEPS = 5
"""Evenly spaced timesteps whose calls are repeated."""
FIRST_SAMPLE = 2_000_000
"""Index of the first sampled trajectory: its noise is neither that of a calibration sample nor of an evaluated image."""
_INITS: dict[str, RangeMethod] = {"minmax": "max", "percentile": "percentile"}


def measure(loaded: LoadedPipeline, decisions: Sequence[LayerDecision], spec: Any, ctx: RunContext, store: TrajectoryStore) -> Sensitivity:
    """The table of every Linear and Conv2d, those that the policy keeps in full precision included.

    Args:
        loaded: the full-precision pipeline, left as it was.
        decisions: of every layer; widths replace `bits_w`, granularity and symmetry are theirs.
        spec: `calibrate` of the recipe.
        store: captured calls of the same model.
    """
    own = {decision.name: _candidate(decision, ctx) for decision in decisions}
    rule = RangeRule(ctx.recipe.quantize.weights.init or _INITS.get(spec.method, "mse"))
    calls = _Calls.pick(store, spec.sensitivity_samples)
    widths = sorted(spec.sensitivity_bits)
    tables = {bits: _fast_unit(loaded.denoiser, own, bits, rule, calls, ctx) for bits in widths}
    if spec.sensitivity == "end_to_end":
        images = _image_units(loaded, own, widths, rule, spec, ctx)
        for bits, name in ((bits, name) for bits in widths for name in own):
            tables[bits][name] |= images[name][str(bits)]
    kept = {decision.name for decision in decisions if decision.skipped_why}
    layers = [_layer(decision, None if name in kept else decision.bits_w, widths, tables) for name, decision in own.items()]
    return Sensitivity(
        method=spec.sensitivity,
        model=loaded.identity["digest"],
        sampler=ctx.recipe.sampler.model_dump(mode="json"),
        init=rule.method,
        timesteps=calls.timesteps,
        samples=spec.sensitivity_samples,
        layers=layers,
    )


def _candidate(decision: LayerDecision, ctx: RunContext) -> LayerDecision:
    """The layer as if its weight alone were quantized; a skipped layer takes the policy's default granularity per channel."""
    symmetric = ctx.recipe.quantize.weights.symmetric if decision.skipped_why else decision.symmetric
    return replace(decision, bits_a=None, timestep_aware=False, skipped_why=None, symmetric=symmetric)


def _layer(decision: LayerDecision, bits_w: int | None, widths: list[int], tables: dict[int, dict[str, Any]]) -> LayerErrors:
    entries = [tables[bits][decision.name] for bits in widths]
    ranges = entries[0]["input_ranges"]
    errors = [
        WidthErrors(bits=bits, **{k: v for k, v in entry.items() if k != "input_ranges"})
        for bits, entry in zip(widths, entries, strict=True)
    ]
    return LayerErrors(
        name=decision.name,
        type=decision.type,
        shape=decision.shape,
        role=decision.role,
        bits_w=bits_w,
        input_ranges=ranges,
        widths=errors,
    )


# ------------------------------------------------------------ layer by layer


@dataclass(frozen=True)
class _Calls:
    """Captured calls at a few timesteps, cut to some samples."""

    timesteps: list[float]
    arguments: list[dict[str, Any]]

    @classmethod
    def pick(cls, store: TrajectoryStore, samples: int) -> _Calls:
        known = store.timesteps()
        places = torch.linspace(0, len(known) - 1, min(TIMESTEPS, len(known))).round().long().tolist()
        timesteps = [known[place] for place in places]
        return cls(timesteps, [call for timestep in timesteps for call in calls_at(store, timestep, samples)])


@dataclass
class _Watch:
    """What the hook of one layer sums over the calls."""

    twin: QuantizedLayer
    weight: ErrorSum = field(default_factory=ErrorSum)
    activation: ErrorSum = field(default_factory=ErrorSum)
    ranges: list[tuple[float, float]] = field(default_factory=list)


def _fast_unit(
    denoiser: nn.Module, own: dict[str, LayerDecision], bits: int, rule: RangeRule, calls: _Calls, ctx: RunContext
) -> dict[str, dict[str, Any]]:
    """Errors of all layers at one width, by layer."""
    path = ctx.resume / f"sensitivity-{bits}.json"
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    twins = {name: coded_twin(denoiser.get_submodule(name), replace(decision, bits_w=bits), rule) for name, decision in own.items()}
    watches = {name: _Watch(twin) for name, twin in twins.items()}
    with _watched(denoiser, watches, IntGrid(bits)):
        for arguments in calls.arguments:
            run_denoiser(denoiser, arguments)
    unit = {name: _sums(denoiser.get_submodule(name), watch) for name, watch in watches.items()}
    write_json(path, unit)
    ctx.events.log(f"sensitivity: layers at {bits} bits")
    return unit


def coded_twin(layer: nn.Module, decision: LayerDecision, rule: RangeRule) -> QuantizedLayer:
    """The layer with its weight at `decision.bits_w`, float activations, in f32 on the layer's device."""
    state = code_layer(layer, decision, rule, None)
    twin = build_layer(layer, decision, CodedWeight(state), state.bias, None, StepContext())
    return twin.to(layer.weight.device).eval()  # type: ignore[union-attr, arg-type]


@contextmanager
def _watched(denoiser: nn.Module, watches: dict[str, _Watch], grid: IntGrid) -> Iterator[None]:
    def hook_of(watch: _Watch) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            x = args[0].float()
            watch.ranges.append((float(x.amin()), float(x.amax())))
            watch.weight.add(watch.twin(x), output)
            rounded = fake_quantize(x, choose_qparams(x, grid), grid).to(args[0].dtype)
            watch.activation.add(module.forward(rounded, *args[1:]), output)

        return hook

    with ExitStack() as stack:
        for name, watch in watches.items():
            stack.callback(denoiser.get_submodule(name).register_forward_hook(hook_of(watch)).remove)
        yield


def _sums(layer: nn.Module, watch: _Watch) -> dict[str, Any]:
    weight: torch.Tensor = layer.weight.detach().float()  # type: ignore[operator]
    coded = weight_of(watch.twin).float()
    reached = watch.weight.count > 0
    return {
        "weight_mse": (weight - coded).square().mean().item(),
        "weight_sqnr_db": weight_sqnr_db(layer, watch.twin),
        "output_error": watch.weight.relative if reached else None,
        "output_mse": watch.weight.mse if reached else None,
        "activation_error": watch.activation.relative if reached else None,
        "input_ranges": watch.ranges,
    }


# ------------------------------------------------------------ final image


def _image_units(
    loaded: LoadedPipeline, own: dict[str, LayerDecision], widths: list[int], rule: RangeRule, spec: Any, ctx: RunContext
) -> dict[str, dict[str, dict[str, float]]]:
    """Error of the final latent by layer and width, at equal seeds."""
    truth = _latents(loaded, spec, ctx)
    found: dict[str, dict[str, dict[str, float]]] = {}
    started, measured = time.monotonic(), 0
    for index, (name, decision) in enumerate(own.items()):
        path = ctx.resume / f"sensitivity-image-{index:05d}.json"
        if not path.exists():
            unit = {str(bits): _image_errors(loaded, replace(decision, bits_w=bits), rule, truth, spec, ctx) for bits in widths}
            write_json(path, unit)
            measured += 1
        found[name] = json.loads(path.read_text(encoding="utf-8"))
        left = (time.monotonic() - started) / max(1, measured) * (len(own) - index - 1)
        ctx.events.progress("sensitivity of the final image", index + 1, len(own), f"about {left / 60:.0f} min left")
    return found


def _image_errors(
    loaded: LoadedPipeline, decision: LayerDecision, rule: RangeRule, truth: torch.Tensor, spec: Any, ctx: RunContext
) -> dict[str, float]:
    original = loaded.denoiser.get_submodule(decision.name)
    replace_(loaded.denoiser, decision.name, coded_twin(original, decision, rule))
    try:
        error = ErrorSum()
        error.add(_latents(loaded, spec, ctx), truth)
    finally:
        replace_(loaded.denoiser, decision.name, original)
    return {"image_error": error.relative, "image_mse": error.mse}


def _latents(loaded: LoadedPipeline, spec: Any, ctx: RunContext) -> torch.Tensor:
    count = spec.sensitivity_samples
    prompts = prompts_for(spec.data.prompts, count)
    arguments: dict[str, Any] = {"count": count, "batch": count, "prompts": prompts, "seed": ctx.recipe.seed}
    return generate(loaded, ctx.recipe.sampler, start=FIRST_SAMPLE, output="latent", **arguments)
