"""The schema as a tree that can be walked, listed and searched: locations of errors, suggestions, `qdm schema FIELD`."""

from __future__ import annotations

import types
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.recipe.source import Path_
from qdm_cli.engine.spec import Bytes, Spec, parse_bytes

EXTENDS = "extends"
"""The one key that a recipe file may hold and that is gone once it is loaded."""


@dataclass(frozen=True)
class Shape:
    """What a field accepts, null aside.

    Attributes:
        sections: discriminator value (or class name, where there is one class) -> class.
        item: annotation of the entries; None = not a list. `items`: exact number of entries; None = any.
        choices: legal literal values. `scalars`: other plain types.
        nullable: null is legal.
    """

    sections: dict[str, type[Spec]]
    item: Any
    items: int | None
    choices: tuple[Any, ...]
    scalars: tuple[Any, ...]
    nullable: bool

    @property
    def alternatives(self) -> int:
        return bool(self.sections) + (self.item is not None) + bool(self.choices or self.scalars)


@dataclass(frozen=True)
class Field:
    """One setting.

    Attributes:
        path: dotted, `N` for a list index, without discriminator values.
        name: last part of the path.
        owner: method whose setting it is; None = not one of several.
        text: description. `type`: in words. `default`: YAML text; None = required.
    """

    path: str
    name: str
    owner: str | None
    text: str
    type: str
    default: Any
    required: bool


def shape_of(annotation: Any) -> Shape:
    """Flatten Annotated, Optional and unions."""
    models: list[type[Spec]] = []
    item, items, nullable = None, None, False
    choices: list[Any] = []
    scalars: list[Any] = []
    for part in _members(annotation):
        if part is type(None):
            nullable = True
        elif get_origin(part) is tuple:
            args = get_args(part)
            item, items = args[0], None if args[-1] is Ellipsis else len(args)
        elif get_origin(part) is Literal:
            choices += get_args(part)
        elif isinstance(part, type) and issubclass(part, Spec):
            models.append(part)
        else:
            scalars.append(part)
    sections = {(_tag(model) if len(models) > 1 else model.__name__): model for model in models}
    return Shape(sections, item, items, tuple(choices), tuple(scalars), nullable)


def _members(annotation: Any) -> Iterator[Any]:
    if annotation is Bytes:
        yield parse_bytes
    elif get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from _members(part)
    else:
        yield annotation


def _tag(model: type[Spec]) -> str:
    return str(get_args(model.model_fields["method"].annotation)[0])


def owner_of(model: type[Spec]) -> str | None:
    """The method whose settings this class holds."""
    return _tag(model) if "method" in model.model_fields else None


@cache
def catalogue() -> tuple[Field, ...]:
    """Every setting of a recipe, in the order of the schema."""
    extends = Field(
        EXTENDS, EXTENDS, None, "Bundled names or files that this one refines; lists are replaced.", "a list of text", (), False
    )
    return (extends, *_walk(Recipe, "", None))


def _walk(model: type[Spec], prefix: str, owner: str | None) -> Iterator[Field]:
    for name, info in model.model_fields.items():
        shape = shape_of(info.annotation)
        path = f"{prefix}{name}"
        yield Field(path, name, owner, info.description or "", describe(shape, info), default_of(info), info.is_required())
        yield from _below(shape, path, owner)


def _below(shape: Shape, path: str, owner: str | None) -> Iterator[Field]:
    for section in shape.sections.values():
        yield from _walk(section, f"{path}.", owner_of(section) or owner)
    if shape.item is not None:
        yield from _below(shape_of(shape.item), f"{path}.N", owner)


def default_of(info: FieldInfo) -> Any:
    """The default as plain data; None for a required field."""
    value = info.get_default(call_default_factory=True)
    return None if value is PydanticUndefined else plain(value)


def plain(value: Any) -> Any:
    """Specs and tuples -> dicts and lists."""
    if isinstance(value, Spec):
        return value.model_dump(mode="json")
    return [plain(item) for item in value] if isinstance(value, tuple) else value


_SIZE = "a size such as 64GiB or 450MB"
_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def describe(shape: Shape, info: FieldInfo | None = None) -> str:
    """A type in words: `2, 3 or 4`, `a whole number, at least 1`, `a section`, `a list of text`."""
    if info is not None and any(getattr(rule, "func", None) is parse_bytes for rule in info.metadata):
        return _SIZE
    parts = []
    if shape.choices:
        parts.append(any_of(shape.choices))
    parts += [_WORDS.get(scalar, _SIZE) for scalar in shape.scalars]
    if len(shape.sections) > 1:
        parts.append(f"a section with method {any_of(tuple(shape.sections))}")
    elif shape.sections:
        parts.append("a section")
    if shape.item is not None and shape.choices and shape_of(shape.item).choices == shape.choices:
        parts.append("a list of these")
    elif shape.item is not None:
        parts.append(("a list of " if shape.items is None else f"a list of {shape.items}: ") + _plural(shape_of(shape.item)))
    words = " or ".join(parts) + _bounds(info)
    return f"{words}, or null" if shape.nullable else words


def _plural(shape: Shape) -> str:
    return "sections" if shape.sections and shape.alternatives == 1 else describe(shape)


def _bounds(info: FieldInfo | None) -> str:
    texts = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    rules = info.metadata if info else []
    found = [(texts[key], value) for rule in rules for key in texts if (value := getattr(rule, key, None)) is not None]
    return "".join(f", {text} {value:g}" for text, value in found)


def any_of(values: tuple[Any, ...]) -> str:
    """`2, 3 or 4` in the spelling of YAML."""
    texts = [yaml_text(value) for value in values]
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} or {texts[-1]}"


def yaml_text(value: Any) -> str:
    """A value as its author would write it: true, null, 5, 'text', [1, 2]."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        return f"'{value}'" if len(value) <= 60 else f"'{value[:57]}...'"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class Place:
    """A path of the schema that was followed as far as it exists.

    Attributes:
        path: without discriminator values.
        model: section that holds the last key; None = the last step was into a list or a value.
        info: field of the last key; None = unknown to the schema.
        shape: of what stands there; None = unknown to the schema.
    """

    path: Path_
    model: type[Spec] | None
    info: FieldInfo | None
    shape: Shape | None


_ROOT = Place((), None, None, Shape({"Recipe": Recipe}, None, None, (), (), False))


def follow(loc: tuple[Any, ...], data: Any) -> Place | None:
    """Pydantic's error location -> place in the author's file: tags and union labels dropped.

    Returns:
        None where the error belongs to a union member that the data does not mean (a list error for a value that is a section).
    """
    place, rest = _ROOT, list(loc)
    while rest and place.shape is not None:
        shape, sections = place.shape, list(place.shape.sections.values())
        if len(sections) > 1 and rest[0] in shape.sections:
            sections = [shape.sections[rest.pop(0)]]
        elif shape.alternatives > 1 and _kind_of_label(str(rest.pop(0)), shape) != _meant(data, shape):
            return None
        if rest:
            step = rest.pop(0)
            place, data = _step(place, sections, step), value_at(data, (step,))
    return place


def known(path: Path_) -> Place:
    """Follow a plain path; the settings of all methods count."""
    place = _ROOT
    for step in path:
        if place.shape is None:
            return Place(path, None, None, None)
        place = _step(place, list(place.shape.sections.values()), step)
    return place


def value_at(data: Any, path: Path_) -> Any:
    """None where the data ends before the path does."""
    for step in path:
        try:
            data = data[step]
        except (KeyError, IndexError, TypeError):
            return None
    return data


def _step(place: Place, sections: list[type[Spec]], step: Any) -> Place:
    path = (*place.path, step)
    if isinstance(step, int) and place.shape is not None and place.shape.item is not None:
        return Place(path, None, None, shape_of(place.shape.item))
    holder = next((section for section in sections if step in section.model_fields), sections[0] if sections else None)
    info = holder.model_fields.get(step) if holder else None
    return Place(path, holder, info, shape_of(info.annotation) if info else None)


def kind_of(value: Any) -> str:
    return "section" if isinstance(value, dict) else "list" if isinstance(value, list) else "value"


def _meant(value: Any, shape: Shape) -> str:
    """The union member that a value is an attempt at."""
    legal = {"value": bool(shape.choices or shape.scalars), "section": bool(shape.sections), "list": shape.item is not None}
    return kind_of(value) if legal[kind_of(value)] else next(kind for kind, is_legal in legal.items() if is_legal)


def _kind_of_label(label: str, shape: Shape) -> str:
    return "section" if label in shape.sections else "list" if label.startswith("tuple[") else "value"
