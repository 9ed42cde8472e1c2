"""The command `qdm`: parse, run one command, print its one result, return the exit code. Imports neither torch nor rich."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NoReturn

import typer
import typer.core
import typer.main

from qdm_cli import report
from qdm_cli.commands._common import GLOBALS, Session, make_session, merged_globals
from qdm_cli.engine.errors import EnvironmentProblem, GateFailed, InputError, QdmError
from qdm_cli.report import ClosedPipe, Result, Terminal

# Name -> module:function, one line of help, two examples. The module is imported when its command is called, never for `qdm --help`.
COMMANDS: dict[str, tuple[str, str, tuple[str, str]]] = {
    "run": (
        "qdm_cli.commands.run:run",
        "All stages of one or several recipes, in order.",
        ("qdm run quickstart", "qdm run quickstart finetune.iterations=100 --out /tmp/quick"),
    ),
    "calibrate": (
        "qdm_cli.commands.calibrate:calibrate",
        "Trajectories of the full-precision model, and ranges from them.",
        ("qdm calibrate quickstart", "qdm calibrate r.yaml calibrate.data.samples=32 --device cpu"),
    ),
    "finetune": (
        "qdm_cli.commands.finetune:finetune",
        "Train the quantized model to follow the full-precision one.",
        ("qdm finetune quickstart", "qdm calibrate r.yaml | qdm finetune r.yaml --from -"),
    ),
    "cache": (
        "qdm_cli.commands.cache:cache",
        "Choose which denoising steps reuse features, and measure it.",
        ("qdm cache planned-quickstart", "qdm cache r.yaml --from runs/r/latest-finetune cache.budget.speedup=1.8"),
    ),
    "export": (
        "qdm_cli.commands.export:export",
        "Write a diffusers folder with integer weights, checked in a fresh process.",
        ("qdm export quickstart --out my-model", "qdm export r.yaml --from runs/r/latest-calibrate export.target=dequantized"),
    ),
    "evaluate": (
        "qdm_cli.commands.evaluate:evaluate",
        "Judge an artifact by images and numbers.",
        ("qdm evaluate quickstart", "qdm evaluate r.yaml --from my-model evaluate.samples=16 --format json"),
    ),
    "plan": (
        "qdm_cli.commands.plan:plan",
        "What a recipe would do: layers, bits, bytes, time, memory.",
        ("qdm plan quickstart", "qdm plan r.yaml quantize.weights.bits=8 --format json"),
    ),
    "ls": ("qdm_cli.commands.ls:ls", "Bundled recipes.", ("qdm ls", "qdm ls --format json")),
    "cp": (
        "qdm_cli.commands.cp:cp",
        "Copy a bundled recipe to edit it.",
        ("qdm cp quickstart", "qdm cp quickstart my.yaml --full"),
    ),
    "validate": (
        "qdm_cli.commands.validate:validate",
        "Check recipes without running anything.",
        ("qdm validate r.yaml", "qdm validate recipes/*.yaml --format json"),
    ),
    "schema": (
        "qdm_cli.commands.schema:schema",
        "JSON schema of recipes and results, or one field explained.",
        ("qdm schema > qdm.schema.json", "qdm schema quantize.weights.bits"),
    ),
    "inspect": (
        "qdm_cli.commands.inspect:inspect",
        "What an artifact holds: manifest, bytes, layers.",
        ("qdm inspect runs/quickstart/latest-export", "qdm inspect my-model --layers"),
    ),
    "diff": (
        "qdm_cli.commands.diff:diff",
        "What two artifacts, runs or metrics.json differ in, and which is better.",
        ("qdm diff runs/a runs/b", 'qdm diff base/metrics.json new/metrics.json --fail-if "psnr_change<-0.5"'),
    ),
    "bench": (
        "qdm_cli.commands.bench:bench",
        "Time layers, whole denoisers or an exported model, behind a correctness gate.",
        ("qdm bench sd15", "qdm bench runs/quickstart/latest-export --rounds 20"),
    ),
    "env": ("qdm_cli.commands.env:env", "Versions, devices, usable kernels.", ("qdm env", "qdm env --format json")),
}
STAGE_COMMANDS = ("run", "calibrate", "finetune", "cache", "export", "evaluate")

START = """no command given. Start with one of these:
  qdm run quickstart     compress a small built-in model on the CPU, nothing to download
  qdm ls                 the recipes that come with qdm
  qdm --help             all commands and options"""

EPILOG = """\b
Examples:
  qdm run quickstart --smoke
  qdm calibrate r.yaml | qdm finetune r.yaml --from - | qdm export r.yaml --from -

\b
Options may also follow the command. Each can be set by a variable QDM_<NAME>, such
as QDM_DEVICE=cpu. The result goes to stdout, everything else to stderr."""

INTERRUPTED, TERMINATED, CLOSED_PIPE = 130, 143, 141


@dataclass(frozen=True)
class Call:
    """A parsed command line. It is run outside of Typer, whose own handlers would swallow signals and closed pipes."""

    name: str
    function: Callable[..., Result]
    arguments: dict[str, Any]
    session: Session


@dataclass(frozen=True)
class Root:
    """What the commands find in `ctx.obj` before their own options are merged in."""

    argv: tuple[str, ...]
    engine: Mapping[str, Any]
    early: dict[str, Any]


class LazyGroup(typer.core.TyperGroup):
    """Commands that are imported when they are called; until then only name and help are known."""

    def __init__(self, **attributes: Any):
        super().__init__(**attributes)
        self.commands = {name: typer.core.TyperCommand(name, help=text) for name, (_, text, _) in COMMANDS.items()}

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] in COMMANDS:
            self.commands[args[0]] = build_command(args[0])
        return super().resolve_command(ctx, args)


def build_command(name: str) -> Any:
    """The Typer command of one command function, with the global options added as hidden ones."""
    target, text, examples = COMMANDS[name]
    module, attribute = target.split(":")
    function = getattr(import_module(module), attribute)
    lines = "\n".join(f"  {line}" for line in examples)
    epilog = f"\b\nExamples:\n{lines}\n\nThe options of `qdm --help` may be given here too."
    single = typer.Typer(add_completion=False, rich_markup_mode=None)
    single.command(name, help=_help_text(function.__doc__) or text, epilog=epilog)(with_globals(name, function))
    return typer.main.get_command(single)


def _help_text(docstring: str | None) -> str:
    """The part of a docstring that is for users: everything before its sections for programmers."""
    text = inspect.cleandoc(docstring or "")
    for section in ("Args:", "Returns:", "Raises:"):
        text = text.split(f"\n\n{section}")[0]
    return text


def with_globals(name: str, function: Callable[..., Result]) -> Callable[..., Call]:
    """A function for Typer with the command's own parameters and the global ones; it returns the `Call`."""
    own = inspect.signature(function, eval_str=True).parameters
    contexts = [p.name for p in own.values() if p.annotation is typer.Context]
    extra = [option for option in GLOBALS if option.name not in own]

    def collect(qdm_context: typer.Context, **values: Any) -> Call:
        root: Root = qdm_context.obj
        late = {option.name: values.pop(option.name) for option in extra}
        session = make_session(merged_globals(root.early, late), argv=root.argv, engine=root.engine)
        qdm_context.obj = session
        return Call(name, function, {**values, **dict.fromkeys(contexts, qdm_context)}, session)

    parameters = [inspect.Parameter("qdm_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own.values() if p.name not in contexts]
    parameters += [option.parameter(hidden=True) for option in extra]
    collect.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    collect.__annotations__ = {p.name: p.annotation for p in parameters}
    return collect


def _root(qdm_context: typer.Context, **values: Any) -> None:
    """Makes diffusion models smaller and faster from one recipe file, and proves it."""
    if values.pop("version"):
        from qdm_cli.engine.run.host import qdm_version

        report.write_stdout(f"qdm {qdm_version()}", sys.stdout)
        raise typer.Exit(0)
    if qdm_context.invoked_subcommand is None:
        raise InputError(START)
    qdm_context.obj.early.update(values)


def build_app() -> typer.Typer:
    """The Typer application. Calling it parses and returns a `Call`; `run` also executes it."""
    version = inspect.Parameter(
        "version", inspect.Parameter.KEYWORD_ONLY, default=typer.Option(False, "--version", help="Print the version."), annotation=bool
    )
    context = inspect.Parameter("qdm_context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    parameters = [context, *(option.parameter(hidden=False) for option in GLOBALS), version]
    _root.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    _root.__annotations__ = {p.name: p.annotation for p in parameters}
    application = typer.Typer(rich_markup_mode=None, cls=LazyGroup, pretty_exceptions_enable=False)
    application.callback(invoke_without_command=True, epilog=EPILOG)(_root)
    return application


app = build_app()


def run(argv: Sequence[str], *, engine: Mapping[str, Any] | None = None) -> int:
    """Parse and execute one command line; print its result; return the exit code. Never raises.

    Args:
        argv: without the program's name.
        engine: keyword arguments for `run_stage` and `run_recipe`, such as another table of stages.
    """
    terminal = Terminal(format=_early_format(argv), stdout=sys.stdout)
    command = next((word for word in argv if word in COMMANDS), "qdm")
    try:
        if "--" in argv:
            raise InputError("nothing may follow --: no command of qdm starts another program")
        call = typer.main.get_command(app).main(
            args=list(argv), prog_name="qdm", standalone_mode=False, obj=Root(tuple(argv), engine or {}, {})
        )
        return execute(call) if isinstance(call, Call) else int(call or 0)
    except ClosedPipe:
        return _closed_pipe()
    except BaseException as error:
        return _parse_failure(error, terminal, command, argv)


def _parse_failure(error: BaseException, terminal: Terminal, command: str, argv: Sequence[str]) -> int:
    """Usage errors exit 2. Typer's exceptions are recognised by what they offer: their module differs between its releases."""
    if isinstance(error, SystemExit):
        return _closed_pipe() if isinstance(error.__context__, BrokenPipeError) else int(error.code or 0)
    if isinstance(error, BrokenPipeError):
        return _closed_pipe()
    if hasattr(error, "format_message"):
        error = InputError(_usage_message(error, command, argv))
    if not isinstance(error, QdmError):
        error = _unexpected(error, debug="--debug" in argv)
    return _fail(terminal, error, command)


def _usage_message(error: Any, command: str, argv: Sequence[str]) -> str:
    path = "qdm" if command == "qdm" else f"qdm {command}"
    message = error.format_message()
    option = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and option and command in (*STAGE_COMMANDS, "plan", "validate"):
        hint = _setting_hint(option, argv)
        message = f"no such option {option}; {hint}" if hint else message
    message = message[0].lower() + message[1:]
    return f"{message.rstrip('.')}{'' if message.endswith('?') else '.'} Try '{path} --help'"


def _setting_hint(option: str, argv: Sequence[str]) -> str:
    """`--steps 5` -> `did you mean sampler.steps=5?`; empty = no setting has such a name."""
    from qdm_cli.engine.recipe.suggest import suggest_option

    setting = suggest_option(option)
    if setting is None:
        return ""
    position = next((i for i, word in enumerate(argv) if word.split("=")[0] == option), len(argv))
    _, _, value = argv[position].partition("=") if position < len(argv) else ("", "", "")
    following = argv[position + 1] if position + 1 < len(argv) else ""
    return f"did you mean {setting}={value or (following if not following.startswith('-') else '') or 'VALUE'}?"


def execute(call: Call) -> int:
    """Run a parsed command and print its result."""
    session, terminal = call.session, call.session.terminal
    report.route_libraries(terminal, offline=session.offline)
    started = time.monotonic()
    try:
        with _terminable(), report.reserved_stdout():
            result = call.function(**call.arguments)
        terminal.result(result, call.name, time.monotonic() - started)
        for note in result.notes:
            terminal.error(note)
        return result.exit_code
    except ClosedPipe:
        return _closed_pipe()
    except KeyboardInterrupt as interrupt:
        return _interrupted(interrupt, call)
    except BaseException as error:
        known = error if isinstance(error, QdmError) else _known(error) or _unexpected(error, debug=session.debug)
        if session.debug and not isinstance(error, InputError):
            terminal.error("".join(traceback.format_exception(error)).rstrip())
        return _fail(terminal, known, call.name)
    finally:
        terminal.close()


def _fail(terminal: Terminal, error: QdmError, command: str, exit_code: int | None = None) -> int:
    try:
        if isinstance(error, GateFailed) and error.result is not None:
            terminal.result(Result(data=error.result, exit_code=error.exit_code), command, 0.0)
            terminal.error(f"error: {error}")
        else:
            terminal.failure(error, command, exit_code=exit_code)
    except ClosedPipe:
        return _closed_pipe()
    return error.exit_code if exit_code is None else exit_code


def _known(error: BaseException) -> QdmError | None:
    """Failures outside of a stage that have a better explanation than their type."""
    from qdm_cli.engine.run.failure import missing_package
    from qdm_cli.engine.run.folder import storage_problem

    problem: EnvironmentProblem | None = missing_package(error)
    if problem is None and isinstance(error, OSError):
        from pathlib import Path

        problem = storage_problem(error, Path.cwd())
    return problem


def _unexpected(error: BaseException, *, debug: bool) -> QdmError:
    lines = str(error).strip().splitlines() or ["no message"]
    hint = "" if debug else " (--debug shows the traceback)"
    return QdmError(f"unexpected {type(error).__name__}: {lines[0]}{hint}")


def _interrupted(interrupt: KeyboardInterrupt, call: Call) -> int:
    from qdm_cli.engine.run.failure import Terminated

    name, code = ("SIGTERM", TERMINATED) if isinstance(interrupt, Terminated) else ("SIGINT", INTERRUPTED)
    message = f"interrupted by {name}"
    if call.name in STAGE_COMMANDS:
        message += f"; this continues it:  {shlex.join(['qdm', *call.session.argv])}"
    return _fail(call.session.terminal, QdmError(message), call.name, exit_code=code)


class _terminable:
    """SIGTERM raises like Ctrl-C while a command runs, so that it leaves its folder in order."""

    def __enter__(self) -> None:
        self.previous: Any = None
        if threading.current_thread() is threading.main_thread():
            self.previous = signal.signal(signal.SIGTERM, self._raise)

    def __exit__(self, *_: object) -> None:
        if self.previous is not None:
            signal.signal(signal.SIGTERM, self.previous)

    @staticmethod
    def _raise(*_: object) -> NoReturn:
        from qdm_cli.engine.run.failure import Terminated

        raise Terminated


def _closed_pipe() -> int:
    if sys.stdout is not None:
        report.silence(sys.stdout)
    return CLOSED_PIPE


def _early_format(argv: Sequence[str]) -> report.Format:
    """The format that errors of the command line itself are printed in."""
    words = [*argv, ""]
    named = [words[i + 1] for i, word in enumerate(argv) if word == "--format"]
    named += [word.removeprefix("--format=") for word in argv if word.startswith("--format=")]
    wanted = named[-1] if named else os.environ.get("QDM_FORMAT", "")
    return "json" if wanted == "json" else "quiet" if wanted == "quiet" else "human"


def main(*, engine: Mapping[str, Any] | None = None) -> NoReturn:
    """Entry point of the console script."""
    report.fill_closed_descriptors()
    code = run(sys.argv[1:], engine=engine)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:
        code = _closed_pipe()
    sys.exit(code)
