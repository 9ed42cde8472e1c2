"""`schedule.json`: which denoiser calls are computed in full and which reuse a cut (caching spec 4.8). Imports neither torch nor diffusers.

Per-step corrections lie beside it as safetensors: `scale.<cut id>` and `shift.<cut id>`, [calls, channels] float32; a partial call reads
scale * cached + shift, rows of full calls are 1 and 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field, ValidationError, model_validator

from qdm_cli.engine.artifact import hash_file, hash_json, write_json
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.spec import Spec

SCHEMA = 1
SCHEDULE_FILE = "schedule.json"
CORRECTIONS_FILE = "corrections.safetensors"
LOG_SNR_LIMIT = 30.0
"""Bound of a stored log-SNR: at the ends of a noise schedule it is infinite, and JSON has no infinity."""


class _Part(Spec):
    model_config = ConfigDict(strict=True, populate_by_name=True)


class Provenance(_Part):
    """Where a schedule came from."""

    method: str = "custom"
    """Rule or planner that chose it."""
    created_utc: str | None = None
    """ISO 8601 time; null = not recorded."""
    prompts_sha256: str | None = None
    """Hash of the prompts it was profiled on; null = none."""
    device: str | None = None
    """Device on which latency was measured."""
    profile_sha256: str | None = None
    """Hash of the drift profile; null = no profile."""


class ModelRef(_Part):
    """The denoiser that a schedule was made for."""

    class_: str = Field(alias="class")
    """Class name."""
    config_sha256: str
    """`hash_config` of its configuration."""
    weights_sha256: str | None = None
    """Digest of the base model; null = any weights."""
    quant_sha256: str | None = None
    """Digest of the quantized artifact that was profiled; null = full precision."""


class SamplerRef(_Part):
    """The sampling loop that a schedule was made for."""

    class_: str = Field(alias="class")
    """Scheduler class."""
    config_sha256: str | None = None
    """`hash_config` of the scheduler; null = any."""
    steps: int = Field(ge=1)
    """Denoising steps."""
    calls: int = Field(ge=1)
    """Denoiser calls per trajectory and guidance branch; more than `steps` for Heun, PNDM and their like."""
    start_t: int = Field(0, ge=0)
    """First step (image-to-image starts later)."""
    timesteps: tuple[float, ...]
    """[calls] timestep of each call."""
    log_snr: tuple[float, ...]
    """[calls] log(alpha^2 / sigma^2) of each call, within +-30."""
    step_of_call: tuple[int, ...]
    """[calls] denoising step of each call."""

    @model_validator(mode="after")
    def _consistent(self) -> SamplerRef:
        for name in ("timesteps", "log_snr", "step_of_call"):
            if len(getattr(self, name)) != self.calls:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries for {self.calls} calls")
        steps = self.step_of_call
        if steps[0] != 0 or any(not 0 <= b - a <= 1 for a, b in pairwise(steps)):
            raise ValueError("step_of_call must start at 0 and grow by 0 or 1")
        return self


class Guidance(_Part):
    """How classifier-free guidance calls the denoiser."""

    mode: Literal["batched", "sequential", "none"] = "none"
    """batched = both halves in one call."""
    scale: float | None = None
    """Guidance scale."""


class Cut(_Part):
    """One tensor that can be kept, and the part of the denoiser that it replaces (caching spec 4.1)."""

    id: str = Field(pattern=r"^[A-Za-z0-9_]+$")
    """Name within the schedule, such as `up2`."""
    kind: Literal["unet_up", "block_residual"]
    """unet_up: main-branch input of up-layer m. block_residual: what a range of transformer blocks adds."""
    m: int | None = Field(None, ge=1)
    """Up-layer of a `unet_up` cut, counted from 1 at the output."""
    range: tuple[int, int | None] | None = None
    """Blocks [first, end) that a `block_residual` replaces; end null = all remaining."""
    channels: int | None = Field(None, ge=1)
    """Channels of the kept tensor; null = unknown."""
    downscale: int | None = Field(None, ge=1)
    """Side of the denoiser's input over side of the kept tensor; null = unknown or tokens."""
    store_dtype: Literal["compute", "int8"] = "compute"
    """Type it is kept in; compute = as the model makes it."""

    @model_validator(mode="after")
    def _one_place(self) -> Cut:
        if (self.m is not None) != (self.kind == "unet_up") or (self.range is not None) != (self.kind == "block_residual"):
            raise ValueError(f"cut {self.id}: unet_up needs m, block_residual needs range, and neither takes the other")
        return self


class Action(_Part):
    """What one denoiser call does."""

    call: int = Field(ge=0)
    """Position in the trajectory."""
    action: Literal["full", "partial"]
    """full = run everything and keep the cut's tensor; partial = reuse it."""
    cut: str | None = None
    """Cut of the segment; null on a full call that nothing reuses."""
    source: int | None = None
    """Full call whose tensor a partial call reads; null on full calls."""
    order: int = Field(0, ge=0, le=1)
    """0 = plain reuse; 1 = linear extrapolation from the last two full calls."""
    precision: str | None = None
    """Activation precision of this call; null = the model's."""


class Corrections(_Part):
    """Per-step linear correction of the cached tensor."""

    file: str
    """Safetensors file beside the schedule."""
    sha256: str
    """Its hash."""
    kind: Literal["dec", "variance"]
    """dec: per call and channel least squares; variance: scale around the mean."""


class Figures(_Part):
    """Cost and quality of a schedule, predicted or measured."""

    cost: float | None = None
    """Objective of the planner."""
    latency_ms: float | None = None
    """Denoiser time of one trajectory."""
    speedup: float | None = None
    """Uncached over cached time."""
    metrics: dict[str, float | None] = Field(default_factory=dict)
    """Quality against the uncached full-precision model, by name."""
    baseline: dict[str, float | None] = Field(default_factory=dict)
    """The same for fewer steps at equal time."""


class ParetoPoint(_Part):
    """Best schedule found within one latency."""

    k: int = Field(ge=1)
    """Full calls."""
    cost: float
    """Predicted cost."""
    latency_ms: float
    """Predicted latency."""
    refresh: tuple[int, ...]
    """Full calls."""


class Schedule(_Part):
    """`schedule.json`."""

    schema_: Literal[1] = Field(1, alias="schema")
    """Version of this format."""
    qdm_version: str = ""
    """Version that wrote it."""
    provenance: Provenance = Provenance()
    """Where it came from."""
    model: ModelRef
    """Denoiser that it was made for."""
    sampler: SamplerRef
    """Sampling loop that it was made for."""
    guidance: Guidance = Guidance()
    """Guidance that it was made for."""
    cuts: tuple[Cut, ...]
    """Cuts that the actions name."""
    actions: tuple[Action, ...]
    """One per denoiser call."""
    corrections: Corrections | None = None
    """Correction of the cached tensors; null = none."""
    predicted: Figures | None = None
    """The planner's figures; null = no plan."""
    verified: Figures | None = None
    """Measured on held-out samples; null = not verified."""
    pareto: tuple[ParetoPoint, ...] = ()
    """Other schedules, by growing latency."""

    @model_validator(mode="after")
    def _executable(self) -> Schedule:
        if trouble := next(_faults(self), None):
            raise ValueError(trouble)
        return self

    @property
    def refreshes(self) -> tuple[int, ...]:
        """Calls computed in full, ascending."""
        return tuple(action.call for action in self.actions if action.action == "full")

    def cut(self, name: str) -> Cut:
        """The cut called `name`."""
        return next(cut for cut in self.cuts if cut.id == name)


def _faults(schedule: Schedule) -> Iterator[str]:
    """Violated invariants of caching spec 4.8, in order."""
    names = [cut.id for cut in schedule.cuts]
    if len(set(names)) != len(names):
        yield "two cuts have the same id"
    if len(schedule.actions) != schedule.sampler.calls:
        yield f"{len(schedule.actions)} actions for {schedule.sampler.calls} calls"
    latest: Action | None = None
    full_calls = 0
    for index, action in enumerate(schedule.actions):
        place = f"action {index}"
        if action.call != index:
            yield f"{place}: call is {action.call}, calls must count up from 0"
        if action.cut is not None and action.cut not in names:
            yield f"{place}: unknown cut {action.cut}"
        if action.action == "full":
            if action.source is not None or action.order:
                yield f"{place}: a full call has neither source nor order"
            latest, full_calls = action, full_calls + 1
        elif latest is None:
            yield f"{place}: the first call must be full"
        elif action.source != latest.call:
            yield f"{place}: source is {action.source}, the latest full call is {latest.call}"
        elif action.cut is None or action.cut != latest.cut:
            yield f"{place}: reuses cut {action.cut}, but the full call {latest.call} keeps {latest.cut}"
        elif action.order >= full_calls:
            yield f"{place}: order {action.order} needs {action.order + 1} earlier full calls"


def make_actions(refreshes: Sequence[int], calls: int, cuts: Sequence[str] | str, order: int = 0) -> tuple[Action, ...]:
    """Actions of a trajectory from its full calls.

    Args:
        refreshes: full calls; order and repetitions do not matter, call 0 is always one.
        cuts: cut id, or one per full call (ascending): the segment that begins there.
        order: of partial calls, where enough full calls precede.

    Raises:
        ValueError: a refresh outside the trajectory, or another number of cuts than of full calls.
    """
    starts = sorted({0, *refreshes})
    if starts[0] < 0 or starts[-1] >= calls:
        raise ValueError(f"full calls must lie in 0..{calls - 1} (got {starts[0]}..{starts[-1]})")
    names = [cuts] * len(starts) if isinstance(cuts, str) else list(cuts)
    if len(names) != len(starts):
        raise ValueError(f"{len(names)} cuts for {len(starts)} full calls")
    actions: list[Action] = []
    for position, (start, end) in enumerate(zip(starts, [*starts[1:], calls], strict=True)):
        reused = names[position] if end > start + 1 else None
        actions.append(Action(call=start, action="full", cut=reused))
        rank = min(order, position)
        actions += [Action(call=call, action="partial", cut=reused, source=start, order=rank) for call in range(start + 1, end)]
    return tuple(actions)


def schedule_from_refreshes(
    refreshes: Sequence[int], *, cuts: Sequence[Cut], model: ModelRef, sampler: SamplerRef, of_segment: Sequence[str] = (), **fields: Any
) -> Schedule:
    """A schedule with these full calls.

    Args:
        cuts: the cuts that are used; the first is every segment's unless `of_segment` says otherwise.
        of_segment: cut id per full call, ascending.
        fields: further fields of `Schedule`.

    Raises:
        ValueError: as `make_actions`.
    """
    actions = make_actions(refreshes, sampler.calls, list(of_segment) or cuts[0].id)
    used = {action.cut for action in actions}
    kept = tuple(cut for cut in cuts if cut.id in used) or tuple(cuts[:1])
    return Schedule(cuts=kept, actions=actions, model=model, sampler=sampler, **fields)


def write_schedule(folder: Path, schedule: Schedule) -> Path:
    """Write `schedule.json` into `folder`, whole or not at all; the corrections it names must lie there already."""
    path = folder / SCHEDULE_FILE
    write_json(path, schedule.model_dump(mode="json", by_alias=True))
    return path


def read_schedule(path: str | Path) -> Schedule:
    """Read a schedule and check its invariants and the hash of its corrections.

    Args:
        path: the file, or a folder that holds `schedule.json`.

    Raises:
        InputError: missing, not readable, broken, or its corrections are missing or changed.
    """
    file = Path(path) / SCHEDULE_FILE if Path(path).is_dir() else Path(path)
    try:
        schedule = Schedule.model_validate_json(file.read_bytes())
    except OSError as error:
        raise InputError(f"{file}: no schedule can be read there ({error.strerror}). Make one with `qdm cache RECIPE`.") from None
    except ValidationError as error:
        raise InputError(f"{file}: not a usable schedule: {_first(error)}. Make it again with `qdm cache RECIPE`.") from None
    if schedule.corrections is not None:
        beside = file.parent / schedule.corrections.file
        if not beside.is_file() or hash_file(beside) != schedule.corrections.sha256:
            raise InputError(f"{beside}: missing, or not the corrections that {file.name} was written with")
    return schedule


def _first(error: ValidationError) -> str:
    detail = error.errors(include_url=False)[0]
    place = ".".join(map(str, detail["loc"]))
    message = detail["msg"].removeprefix("Value error, ")
    return (f"{place}: {message}" if place else message) + (f" ({error.error_count()} problems)" if error.error_count() > 1 else "")


def hash_config(config: Mapping[str, Any]) -> str:
    """sha256 of a diffusers configuration, without private keys (`_diffusers_version` and paths) and how its weights are stored."""
    return hash_json({name: value for name, value in dict(config).items() if not name.startswith("_") and name != "quantization_config"})
