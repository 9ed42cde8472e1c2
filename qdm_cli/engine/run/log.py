"""`run.log`: everything that happens in a stage, beside what people see on the terminal."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from qdm_cli.engine.context import Events

PROGRESS_INTERVAL_S = 30.0


class LoggedEvents:
    """Events that also go into a file; progress at most once per 30 s and task, plus start and end."""

    def __init__(self, events: Events, stream: TextIO):
        self._events = events
        self._stream = stream
        self._printed: dict[str, float] = {}

    def write(self, text: str) -> None:
        """Only into the file. A full disk is reported by whoever writes the result."""
        with suppress(OSError, ValueError):
            self._stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")

    def log(self, message: str) -> None:
        self.write(message)
        self._events.log(message)

    def warn(self, message: str) -> None:
        self.write(f"warning: {message}")
        self._events.warn(message)

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done >= total or task not in self._printed or now - self._printed[task] >= PROGRESS_INTERVAL_S:
            self._printed[task] = now
            self.write(f"{task} {done}/{total} {note}".rstrip())
        if done >= total:
            self._printed.pop(task, None)
        self._events.progress(task, done, total, note)


class _ToFile(logging.Handler):
    def __init__(self, events: LoggedEvents):
        super().__init__()
        self.events = events

    def emit(self, record: logging.LogRecord) -> None:
        self.events.write(f"{record.levelname.lower()} {record.name}: {record.getMessage()}")


@contextmanager
def logged(events: Events, path: Path) -> Iterator[LoggedEvents]:
    """Append to `path` what the stage and the libraries report; a line is in the file as soon as it is written."""
    with open(path, "a", encoding="utf-8", errors="backslashreplace", buffering=1) as stream:
        both = LoggedEvents(events, stream)
        handler = _ToFile(both)
        logging.getLogger().addHandler(handler)
        try:
            yield both
        finally:
            logging.getLogger().removeHandler(handler)
