"""`qdm_cli.cached`: a pipeline along a schedule from a file, from memory, or by DeepCache's uniform rule."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from qdm_cli.engine.caching.fit import check_fits
from qdm_cli.engine.caching.runtime.cache import Cache, active_cache
from qdm_cli.engine.caching.runtime.control import Control
from qdm_cli.engine.caching.runtime.follow import EveryNth, FromSchedule, Source
from qdm_cli.engine.caching.runtime.split import candidate_cuts, find_cut
from qdm_cli.engine.caching.schedule import ModelRef, Schedule, hash_config, read_schedule
from qdm_cli.engine.checkpoint import read_tensors
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models.denoiser import find_denoiser


def cached(
    pipeline: Any,
    schedule: Schedule | str | Path | None = None,
    *,
    interval: int | None = None,
    cut: int | tuple[int, int | None] | None = None,
    resample: bool = True,
    force: bool = False,
    controlnet: Control = "recompute",
    compile: bool | Mapping[str, Any] = False,
) -> Cache:
    """As `qdm_cli.cached`.

    Raises:
        InputError: a broken schedule or one of another model, a cut that the model lacks, both or neither of schedule and interval, or no
            cache is switched on where one is asked for.
    """
    component, denoiser = find_denoiser(pipeline)
    if schedule is None and interval is None:
        active = active_cache(denoiser)
        if active is None:
            raise InputError("no cache is switched on for this pipeline; give a schedule, or interval= for DeepCache's uniform rule")
        return active
    if schedule is not None and (interval is not None or cut is not None):
        raise InputError("give a schedule, or interval= and cut=, and not both")
    corrections: Mapping[str, Any] = {}
    source: Source
    if schedule is None:
        source = EveryNth(candidate_cuts(denoiser)[0] if cut is None else find_cut(denoiser, cut), int(interval or 1))
    else:
        if not isinstance(schedule, Schedule):
            schedule, corrections = with_corrections(schedule)
        check_fits(schedule, model=ModelRef(class_=type(denoiser).__name__, config_sha256=hash_config(denoiser.config)))
        source = FromSchedule(schedule, resample)
    if controlnet not in get_args(Control):
        raise InputError(f"controlnet must be recompute or reuse (got {controlnet!r})")
    options = None if compile is False else {"fullgraph": True, **({} if compile is True else compile)}
    return Cache(pipeline, component, source, corrections=corrections, force=force, controlnet=controlnet, compiled=options)


def with_corrections(path: str | Path) -> tuple[Schedule, dict[str, Any]]:
    """A schedule and the tables of its corrections, empty where it has none.

    Raises:
        InputError: as `read_schedule`.
    """
    schedule = read_schedule(path)
    if schedule.corrections is None:
        return schedule, {}
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    return schedule, read_tensors(folder / schedule.corrections.file)[0]
