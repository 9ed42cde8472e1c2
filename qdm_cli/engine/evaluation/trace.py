"""Errors inside the sampling loop: per timestep and per layer, base model against compressed model at equal seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.diffusion.trajectories import call_arguments, captured_calls, output_tensor, sample_tensor, timestep_of
from qdm_cli.engine.evaluation.folds import fold_factors, times_channels
from qdm_cli.engine.evaluation.subject import Subject, weight_of
from qdm_cli.engine.quant.modules import per_input

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec


@dataclass
class ErrorSum:
    """Pooled squared error against pooled squared signal, in float64."""

    error: float = 0.0
    signal: float = 0.0
    count: int = 0

    def add(self, value: torch.Tensor, truth: torch.Tensor) -> None:
        self.error += (value.double() - truth.double()).square().sum().item()
        self.signal += truth.double().square().sum().item()
        self.count += truth.numel()

    @property
    def relative(self) -> float:
        """|value - truth| / |truth|."""
        return math.sqrt(self.error / self.signal) if self.signal > 0 else math.sqrt(self.error)

    @property
    def mse(self) -> float:
        return self.error / max(1, self.count)


@dataclass
class Trace:
    """Errors by denoiser call and by layer.

    Attributes:
        timesteps: timestep of each call.
        latent: of x_t, each model on its own trajectory.
        noise: of the prediction, both models on the base model's x_t.
        layers: of each layer's output, both layers on the base model's input, over a first, a middle and a last call.
    """

    timesteps: list[float] = field(default_factory=list)
    latent: list[ErrorSum] = field(default_factory=list)
    noise: list[ErrorSum] = field(default_factory=list)
    layers: dict[str, ErrorSum] = field(default_factory=dict)

    def rows(self) -> list[dict[str, float]]:
        """One row per denoiser call, for `metrics.json`."""
        columns = zip(self.timesteps, self.latent, self.noise, strict=True)
        return [
            {
                "call": k,
                "timestep": timestep,
                "latent_error": latent.relative,
                "latent_mse": latent.mse,
                "noise_error": noise.relative,
                "noise_mse": noise.mse,
            }
            for k, (timestep, latent, noise) in enumerate(columns)
        ]

    def metrics(self) -> dict[str, float]:
        """The flat numbers. x_T is the same noise for both, so the first call does not count for the latent error."""
        own = self.latent[1:] or self.latent
        return {
            "latent_error": sum(e.relative for e in own) / len(own),
            "latent_error_last": self.latent[-1].relative,
            "latent_mse_last": self.latent[-1].mse,
            "noise_error": sum(e.relative for e in self.noise) / len(self.noise),
            "noise_error_worst": max(e.relative for e in self.noise),
        }


def trace(
    base: Subject,
    other: Subject,
    sampler: SamplerSpec,
    *,
    count: int,
    batch: int,
    seed: int,
    prompts: list[str] | None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Trace:
    """Sample `count` trajectories with both models and compare them call by call; x_t of one batch is held in memory."""
    result = Trace(layers={row["name"]: ErrorSum() for row in other.quantized})
    for start in range(0, count, batch):
        n = min(batch, count - start)
        arguments: dict[str, Any] = {"start": start, "count": n, "batch": n, "seed": seed, "prompts": prompts, "output": "latent"}
        with teacher_forced(base, other, result, steps=sampler.steps) as inputs:
            generate(base.loaded, sampler, **arguments)
        compared = iter(range(len(inputs)))

        def on_call(call: dict[str, Any], output: torch.Tensor, inputs=inputs, compared=compared) -> None:
            k = next(compared)
            result.latent[k].add(sample_tensor(call), inputs[k])

        with captured_calls(other.denoiser, on_call):
            generate(other.loaded, sampler, **arguments)
        progress(start + n, count)
    return result


@contextmanager
def teacher_forced(base: Subject, other: Subject, result: Trace, *, steps: int) -> Iterator[list[torch.Tensor]]:
    """While the base model samples, call the other model on the same arguments and count the errors; yields the growing list of x_t.

    The other model is called first: that sets its step context, so that its single layers can be called after it on the base's inputs.
    """
    inputs: list[torch.Tensor] = []
    predicted: list[torch.Tensor] = []
    chosen = {0, steps // 2, max(0, steps - 1)}
    folds = fold_factors(base, other)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = call_arguments(module, args, kwargs)
        k = len(inputs)
        if k == len(result.timesteps):
            result.timesteps.append(timestep_of(call))
            result.latent.append(ErrorSum())
            result.noise.append(ErrorSum())
        inputs.append(sample_tensor(call).detach().clone())
        predicted.append(output_tensor(other.denoiser(*args, **kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        result.noise[len(inputs) - 1].add(predicted.pop(), output_tensor(output))

    def compare_layer(name: str, twin: nn.Module) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if len(inputs) - 1 in chosen:
                x = args[0] if name not in folds else times_channels(args[0], folds[name], module)
                result.layers[name].add(twin(x, *args[1:], **kwargs), output)

        return hook

    with ExitStack() as stack:
        stack.callback(base.denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
        stack.callback(base.denoiser.register_forward_hook(after, with_kwargs=True).remove)
        for name in result.layers:
            hook = compare_layer(name, other.denoiser.get_submodule(name))
            stack.callback(base.denoiser.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        yield inputs


def layer_rows(base: Subject, other: Subject, errors: dict[str, ErrorSum]) -> list[dict[str, Any]]:
    """The manifest's rows with the SQNR of each quantized weight and the relative error of its output."""
    rows, folds = [], fold_factors(base, other)
    for row in other.layers:
        name, error = row["name"], errors.get(row["name"])
        extra: dict[str, Any] = {"weight_sqnr_db": None, "output_error": None}
        if error is not None:
            layers = (subject.denoiser.get_submodule(name) for subject in (base, other))
            extra["weight_sqnr_db"] = weight_sqnr_db(*layers, factors=folds.get(name))
            extra["output_error"] = error.relative if error.count else None
        rows.append({**row, **extra})
    return rows


def weight_sqnr_db(layer: nn.Module, twin: nn.Module, *, factors: torch.Tensor | None = None) -> float | None:
    """Signal to quantization noise of a weight in dB; at most 200, None without a weight.

    `factors` [I]: of the input channels, which reach the twin multiplied by them, so that its weight stands for W / factors; None = 1.
    """
    weight, other = weight_of(layer), weight_of(twin)
    if weight is None or other is None:
        return None
    if factors is not None:
        weight = weight / per_input(factors.to(weight.device), weight)
    signal = weight.detach().double().square().sum().item()
    noise = (weight.detach().double() - other.detach().double()).square().sum().item()
    return min(200.0, 10 * math.log10(max(signal, 1e-300) / max(noise, 1e-300)))
