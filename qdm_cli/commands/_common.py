"""What every command shares: the global options as one object."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, get_args

import typer

from qdm_cli.engine.errors import InputError
from qdm_cli.report import Format, Terminal

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


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
        argv: the command line without the program's name.
        engine: keyword arguments for `run_stage`, such as another table of stages (tests).
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
    argv: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GlobalOption:
    """One global option; `QDM_<NAME>` sets it too. Flags have no choices and no type other than bool."""

    name: str
    flags: tuple[str, ...]
    help: str
    type: type = bool
    choices: tuple[str, ...] = ()

    def parameter(self, *, hidden: bool) -> inspect.Parameter:
        """Keyword-only parameter for Typer; the default says "not given", the real one is in `Session`."""
        metavar = None if self.type is bool else "|".join(self.choices) or ("N" if self.type is int else "NAME")
        info = typer.Option(*self.flags, help=self.help, hidden=hidden, metavar=metavar, show_default=False)
        kind: Any = Annotated[bool if self.type is bool else str | None, info]
        default = False if self.type is bool else None
        return inspect.Parameter(self.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)

    def parse(self, text: str, where: str) -> Any:
        """The value of a text from the command line or the environment.

        Raises:
            InputError: not one of the choices, not a number, not a truth value.
        """
        allowed = self.choices or (("true", "false") if self.type is bool else ())
        if self.type is bool and text.lower() in _TRUE + _FALSE:
            return text.lower() in _TRUE
        if self.type is int and text.isdecimal():
            return int(text)
        if self.type is str and (not self.choices or text in self.choices):
            return text
        raise InputError(f"{where}: {text!r} is not {' or '.join(allowed) if allowed else 'a whole number of at least 0'}")


GLOBALS: tuple[GlobalOption, ...] = (
    GlobalOption("device", ("--device",), "auto, cpu, cuda or cuda:N; overrides the recipe.", str),
    GlobalOption("offload", ("--offload",), "Offloading of a GPU pipeline; overrides the recipe.", str, ("none", "model", "group")),
    GlobalOption("format", ("--format",), "Result on stdout: one line, one JSON object, or one line and silence.", str, get_args(Format)),
    GlobalOption("quiet", ("--quiet", "-q"), "Only warnings and errors on stderr."),
    GlobalOption("verbose", ("--verbose", "-v"), "Also what libraries log."),
    GlobalOption("no_progress", ("--no-progress",), "Plain lines instead of progress bars."),
    GlobalOption("offline", ("--offline",), "Download nothing (HF_HUB_OFFLINE counts too)."),
    GlobalOption("seed", ("--seed",), "Seed of everything random; overrides the recipe.", int),
    GlobalOption("fresh", ("--fresh",), "Do again what is already done."),
    GlobalOption("smoke", ("--smoke",), "The whole flow on a shrunken random model, in seconds."),
    GlobalOption("wait", ("--wait",), "Wait for a run folder that another process writes."),
    GlobalOption("debug", ("--debug",), "Tracebacks on stderr."),
    GlobalOption("yes", ("--yes", "-y"), "Answer every question with yes."),
)


def merged_globals(early: Mapping[str, Any], late: Mapping[str, Any], environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Values after the command, else before it, else from `QDM_<NAME>`; options that were not given are absent.

    Raises:
        InputError: a value that the option does not take.
    """
    values: dict[str, Any] = {}
    for option in GLOBALS:
        given = next((value for value in (late.get(option.name), early.get(option.name)) if value not in (None, False)), None)
        variable = f"QDM_{option.name.upper()}"
        if given is not None:
            values[option.name] = option.parse(given, option.flags[0]) if isinstance(given, str) else given
        elif environ.get(variable):
            values[option.name] = option.parse(environ[variable], variable)
    if environ.get("HF_HUB_OFFLINE", "").lower() in _TRUE:
        values.setdefault("offline", True)
    return values


def make_session(values: Mapping[str, Any], **more: Any) -> Session:
    """A session with its terminal from the merged global options."""
    known = {item.name for item in fields(Session)}
    verbosity = 1 if values.get("verbose") else -1 if values.get("quiet") else 0
    form = values.get("format", "human")
    terminal = Terminal(format=form, verbosity=verbosity, animate=not values.get("no_progress", False), stdout=sys.stdout)
    return Session(**{name: value for name, value in values.items() if name in known}, verbosity=verbosity, terminal=terminal, **more)
