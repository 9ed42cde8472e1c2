"""What each call of a trajectory does: a schedule, or a rule, fitted to the grid of timesteps that a sampler really has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from qdm_cli.engine.caching import rules
from qdm_cli.engine.caching.config import FEW_STEPS
from qdm_cli.engine.caching.fit import resample
from qdm_cli.engine.caching.schedule import Action, Cut, SamplerRef, Schedule, make_actions
from qdm_cli.engine.caching.trace import sampler_at
from qdm_cli.engine.errors import InputError

SAME_LOG_SNR = 1e-3
"""Noise levels this near are one: schedulers compute them in float32, and in other orders."""


@dataclass(frozen=True)
class Itinerary:
    """Actions of one trajectory. as_made: the corrections of the schedule hold for it."""

    actions: tuple[Action, ...]
    as_made: bool = True

    @property
    def linear(self) -> bool:
        """Whether a call extrapolates, which needs the tensors of two full calls."""
        return any(action.order for action in self.actions)


class Source(Protocol):
    """Where actions come from."""

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """All cuts that actions may name."""

    @property
    def few(self) -> bool:
        """Whether it was made for few steps, so that they were meant."""

    def actions(self, sampler: SamplerRef) -> Itinerary:
        """For a grid of timesteps."""


@dataclass(frozen=True)
class FromSchedule:
    """A schedule; for another grid it is resampled with a warning, or refused."""

    schedule: Schedule
    resample: bool = True

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return self.schedule.cuts

    @property
    def few(self) -> bool:
        return self.schedule.sampler.steps <= FEW_STEPS

    def actions(self, sampler: SamplerRef) -> Itinerary:
        """
        Raises:
            InputError: another grid, and resampling is not allowed.
        """
        found = unlike_grids(self.schedule.sampler, sampler)
        if found is None:
            return Itinerary(self.schedule.actions)
        if not self.resample:
            raise InputError(f"the schedule was made for another sampler: {found}. Resample it, or plan one with `qdm cache RECIPE`.")
        kept = resample(self.schedule, sampler)
        warnings.warn(
            f"cache: the schedule was made for another sampler ({found}); its {len(self.schedule.refreshes)} full calls were moved to the "
            f"nearest noise levels: {len(kept.refreshes)} of {sampler.calls}. Its figures do not hold; plan one with `qdm cache`.",
            stacklevel=2,
        )
        return Itinerary(kept.actions, as_made=False)


@dataclass(frozen=True)
class EveryNth:
    """DeepCache's uniform rule on whatever grid there is."""

    cut: Cut
    interval: int
    few: bool = False

    @property
    def cuts(self) -> tuple[Cut, ...]:
        return (self.cut,)

    def actions(self, sampler: SamplerRef) -> Itinerary:
        """
        Raises:
            InputError: fewer steps than the interval.
        """
        steps = sampler.step_of_call[-1] + 1
        try:
            full = rules.to_calls(rules.uniform(steps, self.interval), sampler.step_of_call)
        except ValueError as error:
            raise InputError(f"cached: {error}") from None
        return Itinerary(make_actions(full, sampler.calls, self.cut.id))


def unlike_grids(made_for: SamplerRef, here: SamplerRef) -> str | None:
    """What differs between two sampling loops; None = nothing that matters."""
    if made_for.class_ != here.class_:
        return f"{made_for.class_}, here {here.class_}"
    if made_for.calls != here.calls or made_for.steps != here.steps:
        return f"{made_for.steps} steps and {made_for.calls} calls, here {here.steps} and {here.calls}"
    if any(abs(a - b) > SAME_LOG_SNR for a, b in zip(made_for.log_snr, here.log_snr, strict=True)):
        return "other noise levels"
    return None


class Itineraries:
    """Itineraries by grid, each made once.

    Args:
        force: also for samplers of 8 or fewer steps.
    """

    def __init__(self, source: Source, *, force: bool):
        self.source, self.force = source, force or source.few
        self._made: dict[tuple[Any, ...], Itinerary | None] = {}

    def of(self, scheduler: Any) -> Itinerary | None:
        """For the scheduler's present timesteps; None = every call in full, which is said once.

        Raises:
            InputError: as the source's.
        """
        times: Sequence[float] = scheduler.timesteps.tolist()
        steps = int(getattr(scheduler, "num_inference_steps", None) or len(times))
        key = (type(scheduler).__name__, steps, *times)
        if key not in self._made:
            self._made[key] = self._make(lambda: sampler_at(scheduler, times, steps), steps)
        return self._made[key]

    def _make(self, sampler: Callable[[], SamplerRef], steps: int) -> Itinerary | None:
        if steps <= FEW_STEPS and not self.force:
            text = f"{steps} steps are too few to cache: neighbouring calls differ too much. Every call is computed; force=True caches"
            warnings.warn(f"cache: {text}", stacklevel=2)
            return None
        return self.source.actions(sampler())
