"""Pydantic's errors -> lines that the author of a recipe can act on: all at once, in reading order, without names of classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qdm_cli.engine.errors import Problem, RecipeError
from qdm_cli.engine.recipe.fields import Place, any_of, describe, follow, known, value_at, yaml_text
from qdm_cli.engine.recipe.source import Origin, Path_, dotted, leaves
from qdm_cli.engine.recipe.suggest import closest, unknown_setting

NAME_PATTERN = "may hold only letters, digits, '.', '_' and '-', and starts with a letter or a digit"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, before it is placed.

    Attributes:
        path: of the setting; need not exist in the recipe.
        message: without the path.
        hint: the suggestion alone.
    """

    path: Path_
    message: str
    hint: str | None = None


def refuse(
    findings: Sequence[Finding], origins: dict[Path_, Origin], overrides: Sequence[str] = (), others: Sequence[Problem] = ()
) -> RecipeError:
    """The exception for all findings, sorted by position; each stands at its setting, or at the section that lacks it.

    Args:
        others: problems of single overrides, found before there was anything to check.
    """
    placed = sorted({(_origin(item.path, origins), dotted(item.path), item) for item in findings}, key=lambda triple: triple[:2])
    problems = [Problem(item.message, str(origin), _shown(item.path, origin, overrides), item.hint) for origin, _, item in placed]
    return RecipeError(sorted([*problems, *others], key=_override_number))


def _override_number(problem: Problem) -> int:
    kind, _, number = str(problem.where).partition(" ")
    return int(number) if kind == "override" else 0


def _origin(path: Path_, origins: dict[Path_, Origin]) -> Origin:
    while path and path not in origins:
        path = path[:-1]
    return origins.get(path, Origin(0, "recipe", 1, 1))


def _shown(path: Path_, origin: Origin, overrides: Sequence[str]) -> str | None:
    """The dotted path; for the very setting of an override also its value, as typed."""
    text = dotted(path)
    if origin.file is None and overrides[origin.line - 1].startswith(f"{text}="):
        return overrides[origin.line - 1]
    return text or None


def findings_of(error: ValidationError, data: dict[str, Any]) -> list[Finding]:
    """What pydantic found in `data`, in the author's terms."""
    found = [finding for item in error.errors(include_url=False) for finding in _read(item, data)]
    renamed = {(*finding.path[:-1], finding.hint) for finding in found if finding.message.startswith("unknown setting")}
    return [finding for finding in found if not (finding.message.startswith("missing") and finding.path in renamed)]


def booleans_for_numbers(data: dict[str, Any]) -> list[Finding]:
    """`steps: true`, which pydantic reads as 1."""
    found = []
    for path, value in leaves(data):
        shape = known(path).shape if isinstance(value, bool) else None
        if shape and not shape.choices and shape.scalars and not {bool, str} & set(shape.scalars):
            found.append(Finding(path, f"must be {describe(shape, known(path).info)} (got {yaml_text(value)})"))
    return found


def _read(item: ErrorDetails, data: dict[str, Any]) -> Iterator[Finding]:
    place = follow(item["loc"], data)
    if place is None:
        return
    value = value_at(data, place.path)
    kind = item["type"]
    if kind == "extra_forbidden":
        yield Finding(place.path, *unknown_setting(place.path, place.model))
    elif kind == "union_tag_not_found":
        yield _no_method(place, value)
    elif kind == "union_tag_invalid":
        yield _wrong_method(place.path if isinstance(value, str) else (*place.path, "method"), item["ctx"]["tag"], _methods(place))
    elif kind == "literal_error" and place.path[-1] == "method" and place.shape:
        yield _wrong_method(place.path, value, place.shape.choices)
    elif kind in ("missing", "too_short", "too_long"):
        yield _missing(place, data)
    else:
        yield Finding(place.path, *_wrong_value(item, place, value))


def _methods(place: Place) -> tuple[str, ...]:
    return tuple(place.shape.sections) if place.shape else ()


def _no_method(place: Place, value: Any) -> Finding:
    """A section without `method`: most likely the word is misspelt."""
    near = closest("method", [key for key in value if isinstance(key, str)]) if isinstance(value, dict) else None
    if near:
        return Finding((*place.path, near), "unknown setting. Did you mean 'method'?", "method")
    return Finding((*place.path, "method"), f"missing. It is {any_of(_methods(place))}")


def _wrong_method(path: Path_, value: Any, methods: tuple[str, ...]) -> Finding:
    hint = closest(str(value), list(methods))
    meant = f". Did you mean '{hint}'?" if hint else "."
    return Finding(path, f"{yaml_text(value)} is not a method{meant} ({', '.join(methods)})", hint)


def _missing(place: Place, data: dict[str, Any]) -> Finding:
    if place.path and isinstance(place.path[-1], int):  # one entry too few in a list of fixed length
        place = known(place.path[:-1])
    value = value_at(data, place.path)
    if isinstance(value, list) and place.shape and place.shape.items:
        return Finding(place.path, f"must have {place.shape.items} entries (got {len(value)})")
    text = place.info.description if place.info else None
    return Finding(place.path, f"missing. {text}" if text else "missing")


def _wrong_value(item: ErrorDetails, place: Place, value: Any) -> tuple[str, str | None]:
    """Message and hint of a value of a wrong type or out of range."""
    got = f"(got {yaml_text(value)})"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"]), None
    if item["type"] == "string_pattern_mismatch":
        return f"{NAME_PATTERN} {got}", None
    if place.shape is None:
        return item["msg"][:1].lower() + item["msg"][1:], None
    words = describe(place.shape, place.info)
    if len(place.shape.sections) == place.shape.alternatives == 1:
        (model,) = place.shape.sections.values()
        return f"must be a section with settings such as {', '.join(list(model.model_fields)[:3])} {got}", None
    hint = closest(value, [str(choice) for choice in place.shape.choices]) if isinstance(value, str) else None
    return f"must be {words} {got}" + (f". Did you mean '{hint}'?" if hint else ""), hint
