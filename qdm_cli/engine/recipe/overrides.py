"""`KEY=VALUE`, `KEY+=VALUE` and `~KEY` on a loaded recipe. Integers index lists; VALUE is YAML, as in the file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from qdm_cli.engine.errors import Problem, RecipeError
from qdm_cli.engine.recipe.fields import EXTENDS, default_of, known, value_at
from qdm_cli.engine.recipe.source import Document, Origin, Path_, dotted, parse_value
from qdm_cli.engine.recipe.suggest import unknown_setting

OVERRIDE = re.compile(r"~(?P<gone>[^=+\s]+)|(?P<key>[^=+~\s][^=+\s]*)(?P<add>\+?)=(?P<value>.*)", re.DOTALL)


def apply_overrides(document: Document, overrides: Sequence[str], layer: int) -> tuple[Document, list[Problem]]:
    """A new document with the overrides in it, left to right, and what is wrong with those that could not be applied."""
    problems: list[Problem] = []
    for number, text in enumerate(overrides, start=1):
        changed = Document(deepcopy(document.data), dict(document.origins))
        try:
            _apply_(changed, text, Origin(layer, None, number))
            document = changed
        except RecipeError as error:
            problems += error.problems
    return document, problems


def _apply_(document: Document, text: str, origin: Origin) -> None:
    match = OVERRIDE.fullmatch(text)
    if match is None:
        raise _error("an override is KEY=VALUE, KEY+=VALUE or ~KEY", origin, text)
    keys = (match["gone"] or match["key"]).split(".")
    if keys[0] == EXTENDS:
        raise _error("extends is read before overrides; write it into the recipe", origin, text)
    if match["gone"]:
        return _remove_(document, _path(document, keys), origin, text)
    holder, path = _holder_(document, keys, origin, text)
    entries: list[Any] = []
    added: Path_ = ()
    if match["add"]:
        entries = _entries(holder, path, origin, text)
        added = (len(entries),)
    value, origins = parse_value(match["value"], origin, (*path, *added))
    _forget_(document, (*path, *added))
    holder[path[-1]] = [*entries, value] if added else value
    document.origins.update(origins)
    document.origins.setdefault(path, origin)


def _path(document: Document, keys: list[str]) -> Path_:
    """Digits are an index where a list stands, else a name."""
    path: Path_ = ()
    for key in keys:
        path = (*path, int(key) if key.isdecimal() and isinstance(value_at(document.data, path), list) else key)
    return path


def _holder_(document: Document, keys: list[str], origin: Origin, text: str) -> tuple[Any, Path_]:
    """The mapping or list that holds the last key, and its path; sections on the way are made."""
    node: Any = document.data
    path: Path_ = ()
    for depth, key in enumerate(keys):
        step: str | int = key
        if isinstance(node, list):
            if not key.isdecimal() or int(key) >= len(node):
                raise _error(f"{dotted(path)} has {len(node)} entries, from 0; {dotted(path)}+=VALUE appends", origin, text)
            step = int(key)
        elif not isinstance(node, dict):
            raise _error(f"{dotted(path)} is {node!r} and has no settings", origin, text)
        elif key.isdecimal() and (shape := known(path).shape) is not None and shape.item is not None:
            raise _error(f"{dotted(path)} has no entries in this recipe; {dotted(path)}+=VALUE appends", origin, text)
        path = (*path, step)
        if depth < len(keys) - 1:
            node = _enter_(document, node, path, origin)
    return node, path


def _enter_(document: Document, node: Any, path: Path_, origin: Origin) -> Any:
    """Go one step down. A bare suite name becomes the section that it is short for."""
    child = value_at(node, path[-1:])
    if child is None:
        child = {}
        document.origins[path] = origin
    elif isinstance(child, str) and (shape := known(path).shape) is not None and child in shape.sections:
        child = {"method": child}
    node[path[-1]] = child
    return child


def _entries(holder: Any, path: Path_, origin: Origin, text: str) -> list[Any]:
    """The list to append to; one that the recipe does not write starts from the schema's default."""
    current = value_at(holder, path[-1:])
    if current is None:
        info = known(path).info
        current = (default_of(info) if info else None) or []
    if not isinstance(current, list):
        raise _error(f"{dotted(path)} is not a list; use {dotted(path)}=VALUE", origin, text)
    return current


def _remove_(document: Document, path: Path_, origin: Origin, text: str) -> None:
    """Removing a setting that the recipe does not write does nothing; one that does not exist at all is a slip."""
    holder, last = value_at(document.data, path[:-1]), path[-1]
    if isinstance(holder, list) and isinstance(last, int) and last < len(holder):
        del holder[last]
        _close_gap_(document, path, last)
    elif isinstance(holder, dict) and last in holder:
        del holder[last]
        _forget_(document, path)
    elif known(path).shape is None:
        message, hint = unknown_setting(path)
        raise _error(message, origin, text, hint)


def _close_gap_(document: Document, path: Path_, gone: int) -> None:
    """Origins of the entries behind a removed one move up with them."""
    depth = len(path) - 1
    kept: dict[Path_, Origin] = {}
    for key, origin in document.origins.items():
        index = key[depth] if len(key) > depth and key[:depth] == path[:-1] else None
        if not isinstance(index, int) or index < gone:
            kept[key] = origin
        elif index > gone:
            moved = (*key[:depth], index - 1, *key[depth + 1 :])
            kept[moved] = origin
    document.origins.clear()
    document.origins.update(kept)


def _forget_(document: Document, path: Path_) -> None:
    for key in [key for key in document.origins if key[: len(path)] == path]:
        del document.origins[key]


def _error(message: str, origin: Origin, text: str, hint: str | None = None) -> RecipeError:
    return RecipeError([Problem(message, str(origin), text, hint)])
