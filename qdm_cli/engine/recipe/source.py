"""YAML 1.2 text -> plain Python data plus the position of every key and list entry. No tags, no anchors that grow without bound."""

from __future__ import annotations

import datetime
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedBase
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from qdm_cli.engine.errors import Problem, RecipeError

Path_ = tuple["str | int", ...]
"""Keys and list indices from the root of a recipe to one of its values."""

MAX_VALUES = 20_000
MAX_DEPTH = 40
MAX_CHARACTERS = 1_000_000


@dataclass(frozen=True, order=True)
class Origin:
    """Where a value was written; sorts in reading order.

    Attributes:
        layer: 0, 1, ... for `extends` left to right, then the recipe itself, then its overrides.
        file: as shown to people; None = an override.
        line, col: 1-based; for an override `line` is its number.
    """

    layer: int
    file: str | None
    line: int
    col: int = 0

    def __str__(self) -> str:
        return f"override {self.line}" if self.file is None else f"{self.file}:{self.line}:{self.col}"


@dataclass(frozen=True)
class Document:
    """Plain data and the origin of each of its paths; `()` is the whole document."""

    data: dict[str, Any]
    origins: dict[Path_, Origin] = field(default_factory=dict)


def dotted(path: Path_) -> str:
    return ".".join(str(part) for part in path)


def leaves(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value that is neither mapping nor list, with its path."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, (*path, key))
    else:
        yield path, value


def parse_document(text: str, file: str, layer: int = 0) -> Document:
    """Read one recipe file.

    Args:
        text: YAML 1.2; the root must be a mapping.
        file: name used in positions.
        layer: order of this file among those that are merged.

    Raises:
        RecipeError: not YAML, a duplicate key, a tag, a key that is not text, or an empty document.
    """
    reader = _Reader(file, layer)
    node = _parse(text, lambda message, line, col: reader.error(message, Origin(layer, file, line, col)))
    start = Origin(layer, file, 1, 1)
    if node is None:
        raise reader.error("the recipe is empty", start)
    if not isinstance(node, dict):
        raise reader.error("a recipe is a mapping of settings, such as `model: {id: ...}`", start)
    return Document(reader.plain(node, (), start, 0), reader.origins)


def parse_value(text: str, origin: Origin, path: Path_) -> tuple[Any, dict[Path_, Origin]]:
    """The VALUE of an override, read as the file is -> plain value and the origin of every path in it (the override itself).

    Raises:
        RecipeError: not YAML.
    """
    reader = _Reader(None, origin.layer, fixed=origin)
    node = _parse(text, lambda message, line, col: reader.error(f"{text!r} is not YAML: {message}", origin, path))
    return reader.plain(node, path, origin, 0), reader.origins


def _parse(text: str, error: Any) -> Any:
    """ruamel's tree; `error(message, line, col)` makes the exception to raise."""
    if len(text) > MAX_CHARACTERS:
        raise error("too long for a recipe", 1, 1)
    if _bracket_depth(text) > 5 * MAX_DEPTH:  # ruamel takes a minute for 3000 open brackets
        raise error("nested too deeply", 1, 1)
    try:
        return YAML(typ="rt").load(io.StringIO(text))
    except DuplicateKeyError as problem:
        mark = problem.problem_mark
        raise error(f"duplicate key '{str(problem.problem).split(chr(34))[1]}'", mark.line + 1, mark.column + 1) from None
    except MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        line, col = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise error(str(problem.problem or problem.context), line, col) from None
    except RecursionError:
        raise error("nested too deeply", 1, 1) from None
    except (YAMLError, ValueError) as problem:
        raise error(str(problem).strip().splitlines()[0], 1, 1) from None


def _bracket_depth(text: str) -> int:
    steps = ({"[": 1, "{": 1, "]": -1, "}": -1}.get(letter, 0) for letter in text)
    return max(accumulate(steps), default=0)


class _Reader:
    """Collects origins while ruamel's tree is turned into plain types."""

    def __init__(self, file: str | None, layer: int, fixed: Origin | None = None) -> None:
        self.file, self.layer, self.fixed = file, layer, fixed
        self.origins: dict[Path_, Origin] = {}
        self.count = 0

    def error(self, message: str, origin: Origin, path: Path_ = ()) -> RecipeError:
        return RecipeError([Problem(message, str(origin), dotted(path) or None)])

    def plain(self, node: Any, path: Path_, origin: Origin, depth: int) -> Any:
        """Plain dict, list, str, int, float, bool or None; records the origin of `path` and of everything below it."""
        self.origins[path] = origin
        self.count += 1
        if self.count > MAX_VALUES or depth > MAX_DEPTH:
            raise self.error("too many values or nested too deeply (does an anchor contain itself?)", origin, path)
        if isinstance(node, dict):
            return {key: self._child(node, key, path, origin, depth) for key in self._keys(node, path, origin)}
        if isinstance(node, list):
            return [self._child(node, index, path, origin, depth) for index in range(len(node))]
        return self._scalar(node, path, origin)

    def _keys(self, node: dict[Any, Any], path: Path_, origin: Origin) -> Iterator[str]:
        for key in node:
            if not isinstance(key, str):
                raise self.error(f"{key!r} is not a name of a setting", self._position(node, key, origin), path)
            yield key

    def _child(self, node: Any, key: Any, path: Path_, origin: Origin, depth: int) -> Any:
        name = str(key) if isinstance(key, str) else key
        return self.plain(node[key], (*path, name), self._position(node, key, origin), depth + 1)

    def _position(self, node: Any, key: Any, origin: Origin) -> Origin:
        where = getattr(node.lc, "data", None) or {}
        if self.fixed or key not in where:  # a key that came through `<<` has no position of its own
            return self.fixed or origin
        return Origin(self.layer, self.file, where[key][0] + 1, where[key][1] + 1)

    def _scalar(self, node: Any, path: Path_, origin: Origin) -> Any:
        if isinstance(node, datetime.date):  # YAML 1.2 has no dates: it is the text that was written
            return node.isoformat()
        if node is None or isinstance(node, bool):
            return node
        for kind in (str, int, float):
            if isinstance(node, kind) and not isinstance(node, CommentedBase):
                return bool(node) if type(node).__name__ == "ScalarBoolean" else kind(node)
        raise self.error("YAML tags are not allowed here", origin, path)
