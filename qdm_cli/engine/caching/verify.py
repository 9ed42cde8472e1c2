"""A schedule measured on samples that it was not made from (caching spec 4.5): the 2 x 2 table, and fewer steps at equal time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from qdm_cli.engine.caching import rules
from qdm_cli.engine.caching.drive import Loop, last_latents
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.schedule import SamplerRef
from qdm_cli.engine.diffusion.sampling import batches

VERIFY_START = 4_000_000
"""First held-out sample: its noise is that of no calibration, training, profiled or evaluated sample."""

Score = Callable[[torch.Tensor, torch.Tensor], dict[str, float | None]]


@dataclass(frozen=True)
class Samples:
    """images [N, C, H, W] in [0, 1]; latents [N, ...] of the last step; seconds of the whole sampling loop."""

    images: torch.Tensor
    latents: torch.Tensor
    seconds: float


def sample(
    loop: Loop,
    count: int,
    batch: int,
    applied: AbstractContextManager[Any] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> Samples:
    """The held-out samples of one model, inside `applied` (a cache; None = none). progress: is told the number of samples so far."""
    images, latents, started = [], [], time.perf_counter()
    with applied or nullcontext(), last_latents(loop.loaded.pipeline) as latest:
        for part in batches(loop.loaded, loop.sampler, count=count, batch=batch, start=VERIFY_START, prompts=loop.prompts, seed=loop.seed):
            images.append(part)
            # two-pass guidance of DiT carries both halves
            latents.append(latest[0][: len(part)].float().cpu())
            progress(sum(map(len, images)))
    return Samples(torch.cat(images), torch.cat(latents), time.perf_counter() - started)


def latent_error(own: Samples, truth: Samples) -> float:
    """Mean over samples of the relative L2 distance of the last latents."""
    difference = (own.latents - truth.latents).flatten(1).norm(dim=1)
    return float((difference / truth.latents.flatten(1).norm(dim=1).clamp_min(1e-12)).mean())


def fewer_steps(loop: Loop, share: float) -> Loop:
    """The uncached loop with the number of steps whose time is nearest to `share` of its own, at least one.

    Args:
        share: cached over uncached time.
    """
    steps = max(1, round(loop.sampler.steps * share))
    return replace(loop, sampler=loop.sampler.model_copy(update={"steps": steps}))


def uniform_rivals(sampler: SamplerRef, latency: Latency, at_least_ms: float) -> list[tuple[str, int]]:
    """(cut, interval) of the fastest uniform schedule of each cut that takes no less time than `at_least_ms`, where one does.

    Rivals are given the time that whole intervals leave over, so a plan that beats them beats them at equal time.
    """
    steps = sampler.step_of_call[-1] + 1
    found = []
    for cut, partial_ms in latency.partial_ms.items():
        for interval in range(steps, 1, -1):
            full = len(rules.uniform(steps, interval))
            if full * latency.full_ms + (sampler.calls - full) * partial_ms >= at_least_ms:
                found.append((cut, interval))
                break
    return found


@dataclass(frozen=True)
class Interaction:
    """Errors of the last latent against the uncached full-precision model (caching spec 3.5).

    Attributes:
        cache: of caching the full-precision model. `quantization`: of quantizing alone. `joint`: of both.
    """

    cache: float
    quantization: float
    joint: float

    @property
    def excess(self) -> float:
        """joint - (cache + quantization); above 0 the two amplify each other."""
        return self.joint - self.cache - self.quantization

    def metrics(self) -> dict[str, float]:
        """Flat names for the manifest."""
        return {
            "latent_error_cache": self.cache,
            "latent_error_quantization": self.quantization,
            "latent_error_both": self.joint,
            "interaction": self.excess,
        }


def bisected(candidates: int, passes: Callable[[int], bool]) -> int | None:
    """Index of the first of `candidates` that passes, where later ones are slower and better; None = not even the last does.

    About log2(candidates) tests. Quality that falls on the way to slower candidates may hide an earlier one that would pass.
    """
    low, high = 0, candidates - 1
    if not passes(high):
        return None
    while low < high:
        middle = (low + high) // 2
        if passes(middle):
            high = middle
        else:
            low = middle + 1
    return high


def table_rows(errors: Interaction) -> Iterator[tuple[str, float, float]]:
    """(model, error without cache, error with cache)."""
    yield "full precision", 0.0, errors.cache
    yield "quantized", errors.quantization, errors.joint
