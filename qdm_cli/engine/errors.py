"""Errors that a person can act on. Each carries the exit code of the interface (0 done, 2 input, 3 environment, 4 memory, 5 gate)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One line of a refusal.

    Attributes:
        message: what is wrong and, where known, what to do.
        where: `file:line:column` or `override N`; None = no position.
        path: dotted recipe path such as `quantize.weights.bits`; None = not about one field.
        hint: the suggestion alone ("group_size"), for JSON readers.
    """

    message: str
    where: str | None = None
    path: str | None = None
    hint: str | None = None


class QdmError(Exception):
    """Base of all expected failures; `exit_code` is what the process returns."""

    exit_code = 1

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None, path: str | None = None):
        super().__init__(message)
        self.problems: tuple[Problem, ...] = (Problem(message, where, path, hint),)

    def __str__(self) -> str:
        return "\n".join(p.message for p in self.problems)


class InputError(QdmError):
    """Usage, recipe or input artifact is invalid; nothing was run."""

    exit_code = 2


class RecipeError(InputError):
    """All problems of a recipe at once, sorted by position."""

    def __init__(self, problems: list[Problem]):
        super().__init__(problems[0].message if problems else "invalid recipe")
        self.problems = tuple(problems)


class EnvironmentProblem(QdmError):
    """Missing extra, no device, weights not found offline, disk full, folder locked, no permission."""

    exit_code = 3


class OutOfMemory(QdmError):
    """Out of memory; the message has the estimate and the setting to change."""

    exit_code = 4


class GateFailed(QdmError):
    """Export self-check, `fail_if` or divergence. `result` is what is still printed on stdout (None = nothing was published)."""

    exit_code = 5

    def __init__(self, message: str, *, result: Any = None, **kwargs: Any):
        super().__init__(message, **kwargs)
        self.result = result
