"""Whether a schedule fits a model and a sampling loop, and what it is on another grid of timesteps (caching spec 4.8)."""

from __future__ import annotations

import math
from typing import Any

from qdm_cli.engine.caching.schedule import ModelRef, SamplerRef, Schedule, make_actions
from qdm_cli.engine.errors import InputError


def differences(schedule: Schedule, model: ModelRef | None, sampler: SamplerRef | None) -> list[str]:
    """What keeps a schedule from running as it is, one text per fact; empty = it fits. None = not asked.

    The quantization digest is provenance: a schedule planned on one quantized form runs on another.
    """
    found: list[str] = []
    for held, given, names in (
        (schedule.model, model, ("class_", "config_sha256", "weights_sha256")),
        (schedule.sampler, sampler, ("class_", "steps", "calls")),
    ):
        for name in names if given is not None else ():
            wanted, have = getattr(held, name), getattr(given, name)
            if None not in (wanted, have) and wanted != have:
                found.append(f"{name.rstrip('_')} {_short(wanted)}, not {_short(have)}")
    if sampler is not None and not found and not _same_times(schedule.sampler, sampler):
        found.append("other timesteps")
    return found


def check_fits(schedule: Schedule, model: ModelRef | None = None, sampler: SamplerRef | None = None) -> None:
    """Refuse a schedule that was made for something else.

    Raises:
        InputError: names each difference, and what to do.
    """
    if found := differences(schedule, model, None):
        raise InputError(f"the schedule was made for another model: {'; '.join(found)}. Plan one with `qdm cache RECIPE`.")
    if found := differences(schedule, None, sampler):
        raise InputError(
            f"the schedule was made for another sampler: {'; '.join(found)}. Resample it, or plan one with `qdm cache RECIPE`."
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text


def _same_times(one: SamplerRef, other: SamplerRef) -> bool:
    return all(math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-5) for a, b in zip(one.timesteps, other.timesteps, strict=True))


def resample(schedule: Schedule, sampler: SamplerRef) -> Schedule:
    """The same schedule for another grid of timesteps: each full call moves to the call nearest in log-SNR (caching spec 4.8).

    Call 0 stays full, calls that fall together become one, and where every full call began a step it still does. Figures, corrections
    and the Pareto curve belong to the old grid and are dropped.
    """
    old, new = schedule.sampler, sampler
    aligned = all(call == 0 or old.step_of_call[call] != old.step_of_call[call - 1] for call in schedule.refreshes)
    steps = new.step_of_call
    allowed = [call for call in range(new.calls) if not aligned or call == 0 or steps[call] != steps[call - 1]]
    cut_at: dict[int, str] = {}
    for call in schedule.refreshes:
        nearest = min(allowed, key=lambda candidate: (abs(new.log_snr[candidate] - old.log_snr[call]), candidate))
        # a full call that nothing reused may now begin a longer segment: it keeps what its predecessor kept
        name = schedule.actions[call].cut or (list(cut_at.values())[-1] if cut_at else schedule.cuts[0].id)
        cut_at.setdefault(0 if call == 0 else nearest, name)
    starts = sorted(cut_at)
    order = max((action.order for action in schedule.actions), default=0)
    actions = make_actions(starts, new.calls, [cut_at[start] for start in starts], order)
    cleared = {"corrections": None, "predicted": None, "verified": None, "pareto": ()}
    return Schedule.model_validate(schedule.model_copy(update={"sampler": new, "actions": actions, **cleared}).model_dump())
