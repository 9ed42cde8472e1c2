"""Measured time of full and partial calls, with the kernels that will run."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from qdm_cli.engine.caching.drive import Loop, Taps, driven
from qdm_cli.engine.caching.schedule import Cut, Schedule
from qdm_cli.engine.diffusion.sampling import generate

WARM_UP, REPEATS = 2, 15
LATENCY_START = 5_000_000
"""Sample whose call is timed."""


@dataclass(frozen=True)
class Latency:
    """Milliseconds per scheduler step: guidance in two calls counts both. partial_ms: by cut id."""

    full_ms: float
    partial_ms: dict[str, float]
    batch: int

    def of(self, schedule: Schedule) -> float:
        """Denoiser time of one trajectory."""
        return sum(self.full_ms if action.action == "full" else self.partial_ms[str(action.cut)] for action in schedule.actions)


def measure(loop: Loop, cuts: list[Cut], *, batch: int, at: int, device: str) -> Latency:
    """Shortest time of the call at position `at` of a trajectory: other work on the machine only ever adds to a time, and not to all kinds
    of call alike. Full and partial calls take turns, so drifts of the clock hit both.

    Args:
        batch: samples per call; guidance doubles them as the pipeline does.
        device: torch device of the denoiser, for synchronisation.
    """
    args, kwargs = call_arguments(loop, batch, at)
    taps = Taps(loop.loaded.denoiser, cuts)
    with torch.no_grad():
        _, features = taps.full(args, kwargs)
        work: dict[str, Callable[[], Any]] = {"": lambda: loop.loaded.denoiser(*args, **kwargs)}
        work |= {cut.id: lambda name=cut.id: taps.partial(name, features[name], args, kwargs) for cut in cuts}  # type: ignore[misc]
        times: dict[str, list[float]] = {name: [] for name in work}
        for turn in range(WARM_UP + REPEATS):
            for name, call in work.items():
                elapsed = _timed(call, device)
                if turn >= WARM_UP:
                    times[name].append(elapsed)
    shortest = {name: loop.passes * min(values) for name, values in times.items()}
    return Latency(shortest.pop(""), shortest, batch)


def call_arguments(loop: Loop, batch: int, at: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of the denoiser call at position `at`, as the pipeline makes them; computes one call."""
    found: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    forward = loop.loaded.denoiser.forward

    def answer(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call == at and not found:
            found.append((args, kwargs))
        if not outputs:
            outputs.append(forward(*args, **kwargs))
        return outputs[0]

    with driven(loop.loaded.denoiser, answer, loop.passes):
        generate(
            loop.loaded, loop.sampler, count=batch, batch=batch, start=LATENCY_START, prompts=loop.prompts, seed=loop.seed, output="latent"
        )
    return found[0]


def _timed(call: Callable[[], Any], device: str) -> float:
    """Milliseconds of one call."""
    if device.startswith("cuda"):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end))
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)
