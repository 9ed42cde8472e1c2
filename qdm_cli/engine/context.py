"""What a stage is given and what it gives back. Imports neither torch nor the terminal."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from qdm_cli.engine.recipe import Recipe


class Events(Protocol):
    """Where a stage reports to people. The terminal implements it; libraries may pass `Silent()`."""

    def log(self, message: str) -> None:
        """One line of information."""

    def warn(self, message: str) -> None:
        """One line that the manifest also records."""

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """Absolute progress of a named task; `done == total` closes it. `note`: short text such as a loss."""


class Silent:
    """Events that go nowhere."""

    def log(self, message: str) -> None: ...
    def warn(self, message: str) -> None: ...
    def progress(self, task: str, done: int, total: int, note: str = "") -> None: ...


@dataclass
class RunContext:
    """Everything a stage needs besides its own spec and its source artifact.

    Attributes:
        recipe: the whole resolved recipe (frozen).
        work: folder `<stage>-<key8>.partial`; whatever lies in `work/payload` when the stage returns is published,
            `work/resume` holds units of an interrupted run and is dropped at publication.
        device: torch device string, already resolved (`cpu`, `cuda`, `cuda:1`).
        smoke: tiny random model, 2-4 steps, 1-2 units per phase.
        warnings: texts that the manifest records; add through `warn`.
    """

    recipe: Recipe
    work: Path
    device: str = "cpu"
    smoke: bool = False
    offline: bool = False
    events: Events = field(default_factory=Silent)
    warnings: list[str] = field(default_factory=list)

    @property
    def payload(self) -> Path:
        return self.work / "payload"

    @property
    def resume(self) -> Path:
        return self.work / "resume"

    def warn(self, message: str) -> None:
        self.warnings.append(message)
        self.events.warn(message)


@dataclass
class StageResult:
    """What a stage adds to the manifest `qdm.json`; its files lie in `ctx.payload`.

    Attributes:
        layers: one dict per layer: name, type, shape, bits_w, bits_a, granularity, group, symmetric, timestep_rows, rule,
            skipped_why, bytes.
        sampler: the resolved sampler {scheduler, steps, eta, guidance, ...} that the artifact holds for.
        metrics: flat name -> number (or None with `<name>_why`).
        bytes_by_part: measured from the written files.
        simulated: True = no integer kernel runs in this artifact.
        verified: load | layout | none.
        gate: not None = publish, then exit 5 with this message (`fail_if`).
        primary: file inside the artifact that is the result printed on stdout; None = the folder.
    """

    layers: list[dict[str, Any]] = field(default_factory=list)
    sampler: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    bytes_by_part: dict[str, int] = field(default_factory=dict)
    base_model: dict[str, Any] = field(default_factory=dict)
    seeds: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    simulated: bool = True
    verified: str = "none"
    gate: str | None = None
    primary: str | None = None
