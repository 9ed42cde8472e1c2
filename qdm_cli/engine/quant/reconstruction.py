"""Unit-by-unit reconstruction of a quantized denoiser (BRECQ; Q-Diffusion, ICCV 2023, sections 3.2 and 3.3).

In execution order: a unit's inputs come from the model whose earlier units are quantized already, its targets from full precision.
Every unit is one resumable file; a unit that was cut off is done again from its own seed, so a resumed run gives the same bits.
"""

from __future__ import annotations

import copy
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.diffusion.step_context import StepContext
from qdm_cli.engine.diffusion.trajectories import Arguments, CallRecord, TrajectoryStore, sample_tensor, take_samples, timestep_of
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import cut_call, records_at, run_denoiser
from qdm_cli.engine.quant.unit_data import Layout, Minibatch, UnitData, outputs_of
from qdm_cli.engine.quant.units import Unit, find_units, in_execution_order, inputs_of, output_of

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

CHECK_SAMPLES = 256
"""Samples on which a unit's error is reported and its result accepted."""


@dataclass(frozen=True)
class CalibrationCalls:
    """Denoiser calls to reconstruct on: some samples of some denoising steps.

    Attributes:
        store: captured full-precision trajectories.
        timesteps: chosen steps.
        samples: samples per step; both halves of a guided batch count and keep equal shares.
    """

    store: TrajectoryStore
    timesteps: tuple[float, ...]
    samples: int

    def __len__(self) -> int:
        return len(self._records())

    def __iter__(self) -> Iterator[Arguments]:
        for record, count in self._records():
            yield cut_call(self.store, record, count)

    def shuffled(self, seed: int) -> Iterator[Arguments]:
        """All calls, in random order."""
        records = self._records()
        for index in torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist():
            yield cut_call(self.store, *records[index])

    def _records(self) -> list[tuple[CallRecord, int]]:
        return [pick for timestep in self.timesteps for pick in records_at(self.store, timestep, self.samples)]


def evenly_spaced(timesteps: list[float], count: int) -> tuple[float, ...]:
    """Exactly `count` distinct entries, both ends included; all of them when there are no more (quantization spec 3.4, trap 5)."""
    if count >= len(timesteps):
        return tuple(timesteps)
    if count == 1:
        return (timesteps[len(timesteps) // 2],)
    return tuple(timesteps[round(i * (len(timesteps) - 1) / (count - 1))] for i in range(count))


@dataclass
class Pair:
    """The full-precision denoiser and the copy of it that is quantized unit by unit; untouched parameters are shared.

    Attributes:
        calls: what both are run on.
        step: tells the copy's quantizers which step it is.
    """

    full: nn.Module
    student: nn.Module
    calls: CalibrationCalls
    step: StepContext = field(default_factory=StepContext)

    @classmethod
    def of(cls, full: nn.Module, calls: CalibrationCalls, step: StepContext) -> Pair:
        """Both in eval mode: dropout would make targets random."""
        full.eval()
        student = copy.deepcopy(full, memo={id(parameter): parameter for parameter in full.parameters()}).eval()
        student.requires_grad_(False)
        step.attach(student)
        return cls(full, student, calls, step)

    @property
    def device(self) -> torch.device:
        return next(self.full.parameters()).device

    def units(self, quantized: list[str]) -> list[Unit]:
        """Units that hold these layers, in execution order."""
        first = next(iter(self.calls))
        return in_execution_order(self.full, find_units(self.full, quantized), lambda: run_denoiser(self.full, first))

    def capture(self, unit: Unit, data: UnitData) -> UnitData:
        """Fill `data`: inputs of the unit in the student, outputs of the unit in full precision."""
        inside, target = self.student.get_submodule(unit.name), self.full.get_submodule(unit.name)
        for arguments in self.calls:
            inputs = inputs_of(inside, lambda arguments=arguments: run_denoiser(self.student, arguments))  # type: ignore[misc]
            output = output_of(target, lambda arguments=arguments: run_denoiser(self.full, arguments))  # type: ignore[misc]
            if not all(bool(torch.isfinite(value).all()) for value in outputs_of(output)):
                raise GateFailed(f"The output of {unit.name} holds NaN or infinity at timestep {timestep_of(arguments):g}.")
            data.add(inputs, output, timestep_of(arguments), len(sample_tensor(arguments)))
        return data.open(self.device)

    def layout(self, unit: Unit) -> Layout:
        """Which of the unit's arguments hold one part per sample."""
        first = next(iter(self.calls))
        total = len(sample_tensor(first))
        module = self.full.get_submodule(unit.name)
        calls = []
        for rows in ([0], [0, 0]):
            arguments = take_samples(first, torch.tensor(rows), total)
            calls.append(inputs_of(module, lambda arguments=arguments: run_denoiser(self.full, arguments)))  # type: ignore[misc]
        return Layout.of(*calls)


class Fit(Protocol):
    """One phase of reconstruction."""

    def start(self, unit: Unit) -> dict[str, torch.Tensor]:
        """What the unit keeps where nothing is learnt."""

    def learns(self, unit: Unit) -> bool:
        """Is there anything to learn in this unit?"""

    def fit(self, unit: Unit, data: UnitData) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Optimise one unit of the student: (tensors to keep, figures to report)."""

    def settle(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> None:
        """Put the kept tensors of a unit into the student, also after a resume."""


def run_units(phase: str, units: list[Unit], pair: Pair, fit: Fit, *, memory: int, ctx: RunContext) -> list[dict[str, Any]]:
    """Fit units one after the other; finished ones are read from `ctx.resume` and not done again.

    Args:
        phase: prefix of the resume files.
        memory: bytes of unit data that may be held at a time; more is streamed from disk.

    Returns:
        One dict of figures per unit in which something was learnt.
    """
    figures = []
    for index, unit in enumerate(units):
        path = ctx.resume / f"{phase}-{index:04d}.safetensors"
        ctx.events.progress(phase, index, len(units), unit.name)
        if not fit.learns(unit):
            fit.settle(unit, fit.start(unit))
            continue
        if not path.exists():
            data = pair.capture(unit, UnitData(ctx.resume / f"{phase}-data", pair.layout(unit), memory))
            tensors, figure = fit.fit(unit, data)
            data.close()
            write_tensors(path, tensors, {"unit": unit.name, **figure})
        tensors, meta = read_tensors(path)
        fit.settle(unit, tensors)
        figures.append(meta)
    ctx.events.progress(phase, len(units), len(units))
    return figures


def unit_error(produced: Any, targets: tuple[torch.Tensor, ...], exponent: float = 2.0) -> torch.Tensor:
    """Sum over channels of |difference|^exponent, mean over batch and positions (quantization spec 3.4, trap 2).

    Channels are dim 1 of images [B, C, H, W] and the last dim of everything else, so that neither the number of tokens nor that of
    positions changes the weight of a regulariser. Outputs of a block with several streams add up.
    """
    total = torch.zeros(())
    for got, want in zip(outputs_of(produced), targets, strict=True):
        error = (got.float() - want.float()).abs().pow(exponent)
        total = total.to(error.device) + error.sum(1 if error.ndim == 4 else -1).mean()
    return total


def unit_output(module: nn.Module, minibatch: Minibatch, step: StepContext) -> Any:
    """The unit on a minibatch whose samples may have different timesteps."""
    args, kwargs = minibatch.call
    step.set_timestep(minibatch.timesteps)
    return module(*args, **kwargs)


def unit_rng(seed: int, unit: Unit) -> torch.Generator:
    """Randomness of one unit alone, so that a resumed run draws what an uninterrupted one draws."""
    return torch.Generator().manual_seed(seed * 2**32 + zlib.crc32(unit.name.encode()))


@torch.no_grad()
def checked_error(module: nn.Module, data: UnitData, step: StepContext, device: torch.device, batch: int) -> float:
    """Relative error of a unit on up to 256 evenly spaced samples: sum of squares of the difference over that of the target."""
    error = signal = 0.0
    for piece in data.spread(CHECK_SAMPLES):
        for rows in piece.split(batch):
            minibatch = data.batch(rows, device)
            produced = outputs_of(unit_output(module, minibatch, step))
            error += sum(float((got.float() - want.float()).square().sum()) for got, want in zip(produced, minibatch.targets, strict=True))
            signal += sum(float(want.float().square().sum()) for want in minibatch.targets)
    return error / max(signal, 1e-30)


def write_report(ctx: RunContext, phases: dict[str, list[dict[str, Any]]]) -> None:
    """`reconstruction.json` beside the state: one entry per unit and phase."""
    (ctx.payload / "reconstruction.json").write_text(json.dumps(phases, indent=1) + "\n")
