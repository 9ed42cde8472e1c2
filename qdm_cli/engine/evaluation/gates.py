"""`fail_if`: conditions METRIC OP NUMBER; true = failure. Imports neither torch nor diffusers."""

from __future__ import annotations

import difflib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from qdm_cli.engine.errors import InputError, Problem, RecipeError
from qdm_cli.engine.evaluation.names import METRICS, of_suites

_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_CONDITION = re.compile(r"\s*([A-Za-z_][\w\[\].-]*)\s*(\?)?\s*(<=|>=|==|!=|<|>)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")


@dataclass(frozen=True)
class Condition:
    """One parsed condition. `optional`: a metric that is null passes."""

    text: str
    metric: str
    op: str
    number: float
    optional: bool = False

    def failure(self, metrics: Mapping[str, Any]) -> str | None:
        """Why this condition fails, or None. A null or absent metric, and NaN, fail unless `optional`."""
        value = metrics.get(self.metric)
        if value is None or math.isnan(value):
            why = metrics.get(f"{self.metric}_why") or "it was not measured"
            return None if self.optional else f"{self.text}: {self.metric} is null ({why}); write '{self.metric}?' to ignore that"
        return f"{self.text}: {self.metric} is {value:.6g}" if _OPERATORS[self.op](value, self.number) else None


def parse_condition(text: str) -> Condition:
    """`psnr<18`, `fid? > 12`.

    Raises:
        InputError: not METRIC OP NUMBER.
    """
    match = _CONDITION.fullmatch(text)
    if match is None:
        raise InputError(f"'{text}' is not METRIC OP NUMBER, such as psnr<18 or fid?>12 (OP is one of < <= > >= == !=)")
    return Condition(text.strip(), match[1], match[3], float(match[4]), optional=match[2] is not None)


def parse_conditions(
    texts: Iterable[str], suites: Set[str], further: Iterable[str] = (), *, path: str = "evaluate.fail_if"
) -> list[Condition]:
    """Parse all conditions and check that the chosen suites measure what they name.

    Args:
        suites: names of the chosen suites.
        further: metric names that this run adds by itself (`psnr_change`).
        path: what the conditions belong to, for messages.

    Raises:
        RecipeError: malformed conditions and unknown metrics, all at once.
    """
    known = [*of_suites(suites), *further]
    parsed, problems = [], []
    for index, text in enumerate(texts):
        place = f"{path}.{index}"
        try:
            condition = parse_condition(text)
        except InputError as error:
            problems.append(Problem(str(error), path=place))
            continue
        if condition.metric not in known:
            problems.append(_unknown(condition.metric, known, place))
        parsed.append(condition)
    if problems:
        raise RecipeError(problems)
    return parsed


def _unknown(name: str, known: list[str], path: str) -> Problem:
    if name in METRICS:
        suite = METRICS[name].suite
        return Problem(f"'{name}' belongs to the suite {suite}, which is not in evaluate.suites", path=path, hint=suite)
    near = difflib.get_close_matches(name, known, n=1) or difflib.get_close_matches(name, list(METRICS), n=1)
    hint = near[0] if near else None
    return Problem(f"'{name}' is not a metric." + (f" Did you mean '{hint}'?" if hint else f" ({', '.join(known)})"), path=path, hint=hint)


def failures(conditions: Iterable[Condition], metrics: Mapping[str, Any]) -> list[str]:
    """Reasons of all conditions that are true."""
    return [reason for condition in conditions if (reason := condition.failure(metrics)) is not None]
