"""What every command shares: the global options as one object, and the arguments of the stage commands."""

from __future__ import annotations

from dataclasses import dataclass, field

from qdm_cli.report import Format, Terminal


@dataclass(frozen=True)
class Session:
    """The global options of one invocation. A command that wants them takes `ctx: typer.Context` and reads `ctx.obj`.

    Attributes:
        device: overrides `device.name` of the recipe; None = the recipe's.
        offload: overrides `device.offload`; None = the recipe's.
        verbosity: -1 (-q), 0, 1 (-v).
        offline: no download.
        seed: overrides `seed` of the recipe; None = the recipe's.
        fresh: redo a finished stage.
        smoke: shrink model and work.
        wait: wait for a locked run folder instead of exiting 3.
        debug: tracebacks on stderr.
        yes: answer every question with yes.
        terminal: where to report; it is the `Events` of the engine.
        tail: arguments after the first `--`, for `--launcher`.
    """

    device: str | None = None
    offload: str | None = None
    format: Format = "human"
    verbosity: int = 0
    no_progress: bool = False
    offline: bool = False
    seed: int | None = None
    fresh: bool = False
    smoke: bool = False
    wait: bool = False
    debug: bool = False
    yes: bool = False
    terminal: Terminal = field(default_factory=Terminal)
    tail: tuple[str, ...] = ()
