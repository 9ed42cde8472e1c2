"""Takes over the denoiser inside a pipeline's own sampling loop, so that every diffusers pipeline can be profiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.runtime import Cache, SplitDenoiser
from qdm_cli.engine.caching.runtime.follow import FromSchedule
from qdm_cli.engine.caching.schedule import Cut, Schedule
from qdm_cli.engine.diffusion.guidance import GuidanceOrder, guidance_order, guidance_scale, guided
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.diffusion.trajectories import output_tensor
from qdm_cli.engine.models import LoadedPipeline

Answer = Callable[[int, int, tuple[Any, ...], dict[str, Any]], Any]
Features = dict[str, torch.Tensor]


class Taps:
    """One forward of a denoiser that also gives the tensors of several cuts, and a partial forward for each.

    Args:
        cuts: with different ids.
    """

    def __init__(self, denoiser: nn.Module, cuts: list[Cut]):
        self.splits = {cut.id: SplitDenoiser(denoiser, cut) for cut in cuts}
        self._nested: list[SplitDenoiser] = []
        model = denoiser
        for cut in cuts:
            # each split watches its own place of the model that the split before made
            self._nested.append(SplitDenoiser(model, cut))
            model = self._nested[-1].full_model
        self._model = model

    def full(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Features]:
        """(what the model returns, tensor of each cut)."""
        features: Features = {}
        call: Callable[..., Any] = self._model
        for split in self._nested:
            call = _keeping(split, call, features)
        return call(*args, **kwargs), features

    def partial(self, cut: str, feature: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the model would return if the cut's tensor were `feature`."""
        return self.splits[cut].partial(feature, *args, **kwargs)


def _keeping(split: SplitDenoiser, call: Callable[..., Any], features: Features) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        output, features[split.cut.id] = split.run_full(call, args, kwargs)
        return output

    return run


@contextmanager
def driven(denoiser: nn.Module, answer: Answer, passes: int = 1) -> Iterator[None]:
    """Let `answer(call, branch, args, kwargs)` stand for the denoiser's forward.

    Args:
        answer: call counts from 0 when the block begins, so one block is one trajectory; branch is the guidance branch of sequential
            guidance, else 0.
        passes: denoiser calls per scheduler step.
    """
    forward, own = denoiser.forward, "forward" in vars(denoiser)
    count = 0

    def answered(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        call, branch = divmod(count, passes)
        count += 1
        return answer(call, branch, args, kwargs)

    denoiser.forward = answered
    try:
        yield
    finally:
        if own:
            denoiser.forward = forward
        else:
            del denoiser.forward


@dataclass(frozen=True)
class Loop:
    """One pipeline's sampling loop on chosen samples.

    Attributes:
        loaded: pipeline and denoiser.
        sampler: the recipe's.
        passes: denoiser calls per scheduler step.
        prompts: of text pipelines; None = the captions that ship with qdm.
        seed: noise of sample i comes from seed + i.
    """

    loaded: LoadedPipeline
    sampler: Any
    passes: int = 1
    prompts: list[str] | None = None
    seed: int = 0

    def run(self, start: int, count: int, answer: Answer | None = None) -> torch.Tensor:
        """Last latent of samples start .. start + count - 1, [count, ...] f32 on the CPU. `answer`: None = the denoiser itself."""
        arguments: dict[str, Any] = {"count": count, "batch": count, "start": start, "seed": self.seed, "prompts": self.prompts}
        if answer is None:
            return generate(self.loaded, self.sampler, output="latent", **arguments)
        with driven(self.loaded.denoiser, answer, self.passes):
            return generate(self.loaded, self.sampler, output="latent", **arguments)

    def noise(self, output: Any, count: int) -> torch.Tensor:
        """The guided prediction in a denoiser's output, [count, ...] f32; halves of sequential guidance stay apart."""
        prediction = output_tensor(output).detach().float()
        order: GuidanceOrder = guidance_order(type(self.loaded.pipeline).__name__, int(prediction.shape[0]), count)
        return guided(prediction, order, guidance_scale(self.loaded.pipeline, self.sampler))


def relative_errors(value: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """[N] |value - truth| / |truth| of each sample, L2 over all other dimensions, in float32; 0 for 0 / 0."""
    own, other = value.detach().float().flatten(1), truth.detach().float().flatten(1)
    return (own - other).norm(dim=1) / other.norm(dim=1).clamp_min(1e-12)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean of `relative_errors`."""
    return float(relative_errors(value, truth).mean())


@contextmanager
def last_latents(pipeline: Any) -> Iterator[list[torch.Tensor]]:
    """A list whose only entry is what the scheduler's latest step gave."""
    scheduler, step, before = pipeline.scheduler, pipeline.scheduler.step, vars(pipeline.scheduler).get("step")
    latest: list[torch.Tensor] = []

    @wraps(step)
    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        latest[:] = [result[0] if isinstance(result, tuple) else result.prev_sample]
        return result

    scheduler.step = kept
    try:
        yield latest
    finally:
        del scheduler.step
        if before is not None:
            scheduler.step = before


def following(loop: Loop, schedule: Schedule, corrections: Mapping[str, torch.Tensor] | None = None) -> Cache:
    """The loop's pipeline along a schedule, as users run it; a context manager."""
    return Cache(loop.loaded.pipeline, loop.loaded.component, FromSchedule(schedule), corrections=corrections, force=True)
