"""What people and programs see: the result on stdout, everything else on stderr. Importing it loads neither rich nor torch."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TextIO

from qdm_cli.engine.errors import Problem, QdmError, RecipeError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

Format = Literal["human", "json", "quiet"]
SCHEMA = 1
PLAIN_INTERVAL_S = 30.0
PIPE_COLUMNS = 200
"""Width of tables that go into a file or pipe, where rich would cut cells at 80."""
_ASCII = str.maketrans({"…": "...", "×": "x", "–": "-", "—": "-", "→": "->", "≤": "<=", "≥": ">=", "✓": "ok", "✗": "no", "·": "-"})


@dataclass(frozen=True)
class Result:
    """What a command function returns; `main` prints it in the chosen format.

    Attributes:
        data: JSON value. A dict that has `status` is printed as it is; anything else is put under `result` of the common object.
        human: prints a table for people on the stdout console it is given; None = `line`.
        line: the one line of stdout for people and pipes; None = `data` itself if that is a string, else indented JSON.
        exit_code: 0, or 5 when a gate failed and the result is printed all the same.
        raw: True = `--format json` prints `data` itself (a JSON schema, say) and not the common object.
        notes: lines for stderr after the result, such as the gate that failed.
    """

    data: Any
    human: Callable[[Console], None] | None = None
    line: str | None = None
    exit_code: int = 0
    raw: bool = False
    notes: tuple[str, ...] = ()


class ClosedPipe(Exception):
    """The reader of stdout has gone; the process exits 141."""


def plain_ascii(text: str, stream: TextIO) -> str:
    """`text` with the marks that a non-UTF-8 stream cannot show replaced by ASCII."""
    encoding = (getattr(stream, "encoding", None) or "ascii").lower().replace("-", "")
    if encoding.startswith("utf"):
        return text
    return text.translate(_ASCII).encode("ascii", "backslashreplace").decode("ascii")


def write_stdout(text: str, stream: TextIO | None) -> None:
    """Print one result. A path keeps its exact bytes whatever the locale; with stdout closed the text goes to stderr.

    Raises:
        ClosedPipe: nobody reads the pipe any more.
    """
    if stream is None:
        if sys.stderr is not None:
            print(plain_ascii(text, sys.stderr), file=sys.stderr, flush=True)
        return
    try:
        buffer = getattr(stream, "buffer", None)
        if buffer is None:
            stream.write(text + "\n")
        else:
            stream.flush()
            buffer.write(os.fsencode(text) + b"\n")
            buffer.flush()
        stream.flush()
    except BrokenPipeError as error:
        raise ClosedPipe from error


def as_json(value: Any, indent: int | None = None) -> str:
    """Pure ASCII JSON, on one line without `indent`; NaN and infinity become null, which strict readers accept."""
    from qdm_cli.engine.artifact import finite

    return json.dumps(finite(value), indent=indent, allow_nan=False, default=str)


def problem_line(problem: Problem) -> str:
    """`file:line:column  dotted.path: message`, without the parts that are unknown."""
    head = f"{problem.where}  " if problem.where else ""
    named = problem.path and not problem.message.startswith(problem.path)
    return head + (f"{problem.path}: " if named else "") + problem.message


@dataclass
class Terminal:
    """Stderr of one command; implements `context.Events`.

    Attributes:
        format: `quiet` = only errors on stderr.
        verbosity: -1 = warnings and errors, 0 = normal, 1 = also what libraries log.
        animate: False = plain timestamped lines even on a terminal.
        stdout: where the result goes; None = closed.
    """

    format: Format = "human"
    verbosity: int = 0
    animate: bool = True
    stdout: TextIO | None = None
    warnings: list[str] = field(default_factory=list)
    _progress: Progress | None = None
    _tasks: dict[str, TaskID] = field(default_factory=dict)
    _printed: dict[str, float] = field(default_factory=dict)
    _console: Console | None = None

    @property
    def live(self) -> bool:
        """Animated progress: a capable terminal, no CI, not switched off."""
        stream = sys.stderr
        dumb = os.environ.get("TERM") in ("dumb", "unknown") or os.environ.get("CI", "").lower() not in ("", "0", "false")
        return self.animate and self.format != "quiet" and self.verbosity >= 0 and not dumb and stream is not None and stream.isatty()

    @property
    def console(self) -> Console:
        """The stderr console, made at first use: rich takes 70 ms to import."""
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        return self._console

    def log(self, message: str) -> None:
        """One line of information."""
        if self.format != "quiet" and self.verbosity >= 0:
            self._line(message)

    def warn(self, message: str) -> None:
        """One line, also kept for the JSON result."""
        self.warnings.append(message)
        if self.format != "quiet":
            self._line(f"warning: {message}", style="yellow")

    def debug(self, message: str) -> None:
        """One line of library chatter, shown with -v."""
        if self.format != "quiet" and self.verbosity > 0:
            self._line(message, style="dim")

    def error(self, message: str) -> None:
        """Lines without a time, shown in every format."""
        self.close()
        self._print(message, style="red")

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        """Absolute progress: a bar on a terminal, else the first and last call and one line per 30 s."""
        if self.live:
            return self._bar(task, done, total, note)
        now, last = time.monotonic(), self._printed.get(task)
        if done >= total:
            self._printed.pop(task, None)
        elif last is not None and now - last < PLAIN_INTERVAL_S:
            return None
        else:
            self._printed[task] = now
        return self.log(f"{task} {done}/{total}" + (f"  {note}" if note else ""))

    def close(self) -> None:
        """End the animation; later lines start it again."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}

    def _bar(self, task: str, done: int, total: int, note: str) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        if self._progress is None:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=self.console)
            self._progress.start()
        if task not in self._tasks:
            self._tasks[task] = self._progress.add_task(task, total=total, note=note)
        self._progress.update(self._tasks[task], completed=done, total=total, note=note)
        if done >= total:
            del self._tasks[task]
            if not self._tasks:
                self.close()

    def _line(self, message: str, style: str | None = None) -> None:
        stamp = "" if self.live else time.strftime("%H:%M:%S ")
        self._print(stamp + message, style)

    def _print(self, text: str, style: str | None = None) -> None:
        """A reader of stderr that has gone must not end hours of work: from then on nothing is shown."""
        if sys.stderr is None:
            return
        text = plain_ascii(text, sys.stderr)
        try:
            if sys.stderr.isatty() or os.environ.get("FORCE_COLOR"):
                self.console.print(text, style=style, markup=False)
            else:
                print(text, file=sys.stderr, flush=True)
        except BrokenPipeError:
            silence(sys.stderr)

    def result(self, result: Result, command: str, seconds: float) -> None:
        """The one result on stdout.

        Raises:
            ClosedPipe: nobody reads the pipe any more.
        """
        self.close()
        if self.format == "json":
            return write_stdout(as_json(self._object(result, command, seconds)), self.stdout)
        if result.human is not None and self.format == "human" and self.stdout is not None:
            return self._table(result.human)
        line = result.line if result.line is not None else result.data
        return write_stdout(line if isinstance(line, str) else as_json(line, indent=2), self.stdout)

    def _object(self, result: Result, command: str, seconds: float) -> Any:
        if result.raw:
            return result.data
        status = "done" if result.exit_code == 0 else "failed"
        common = {"schema": SCHEMA, "command": command, "status": status}
        rest = {"seconds": round(seconds, 3), "warnings": self.warnings}
        if isinstance(result.data, dict) and "status" in result.data:
            return {**common, **result.data, **rest}
        return {**common, "result": result.data, **rest}

    def _table(self, human: Callable[[Console], None]) -> None:
        from rich.console import Console

        try:
            narrow = (self.stdout is not None and self.stdout.isatty()) or "COLUMNS" in os.environ
            human(Console(file=self.stdout, highlight=False, width=None if narrow else PIPE_COLUMNS))
            if self.stdout is not None:
                self.stdout.flush()
        except BrokenPipeError as error:
            raise ClosedPipe from error

    def failure(self, error: QdmError, command: str, *, exit_code: int | None = None) -> None:
        """A refusal: on stderr for people; with `--format json` also the one object on stdout."""
        code = error.exit_code if exit_code is None else exit_code
        lines = [problem_line(problem) for problem in error.problems]
        if isinstance(error, RecipeError):
            count = f"{len(lines)} problem{'s' * (len(lines) != 1)}"
            self.error("\n".join([*lines, f"{count}. Nothing was run. (exit {code})"]))
        else:
            self.error("\n".join(f"error: {line}" for line in lines))
        if self.format == "json":
            errors = [{"where": p.where, "path": p.path, "message": p.message, "hint": p.hint} for p in error.problems]
            head = {"schema": SCHEMA, "command": command, "status": "error", "exit_code": code}
            write_stdout(as_json({**head, "errors": errors, "warnings": self.warnings}), self.stdout)


def fill_closed_descriptors() -> None:
    """Open /dev/null where the shell closed descriptor 0, 1 or 2 (`>&-`): the next file would get that number, and stray output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def reserved_stdout() -> Iterator[None]:
    """While a command works, what libraries print on stdout goes to stderr, from Python, C and child processes alike."""
    if sys.stdout is not None:
        sys.stdout.flush()
    saved = None
    with suppress(OSError):
        saved = os.dup(1)
        os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _flush_c_streams()
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)


def _flush_c_streams() -> None:
    """What C code printed waits in a buffer; it must leave before descriptor 1 is the result's again."""
    if "torch" in sys.modules:
        import ctypes

        ctypes.CDLL(None).fflush(None)


def silence(stream: TextIO) -> None:
    """Point a broken stream at nowhere, so that neither later writes nor the flush at exit fail."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
    except (OSError, ValueError):
        return


class _ToTerminal(logging.Handler):
    """What libraries log: errors always, the rest with -v."""

    def __init__(self, terminal: Terminal):
        super().__init__()
        self.terminal = terminal

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.name}: {record.getMessage()}"
        if record.levelno >= logging.ERROR:
            self.terminal.warn(text)
        else:
            self.terminal.debug(text)


def route_libraries(terminal: Terminal, *, offline: bool) -> None:
    """Send `logging` and `warnings` of libraries through the terminal and switch their bars and telemetry off.

    Must run before diffusers, transformers or huggingface_hub are imported: they read their environment once.
    """
    quiet = "info" if terminal.verbosity > 0 else "error"
    defaults = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    defaults |= {"DIFFUSERS_VERBOSITY": quiet, "TRANSFORMERS_VERBOSITY": quiet, "MPLBACKEND": "Agg", "TOKENIZERS_PARALLELISM": "false"}
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if offline:
        os.environ["HF_HUB_OFFLINE"] = "1"
    logging.captureWarnings(True)
    root = logging.getLogger()
    root.handlers = [handler for handler in root.handlers if not isinstance(handler, _ToTerminal)]
    root.addHandler(_ToTerminal(terminal))
    root.setLevel(logging.INFO if terminal.verbosity > 0 else logging.WARNING)
