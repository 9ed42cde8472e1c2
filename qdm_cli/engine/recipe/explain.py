"""The schema for programs (JSON schema) and for people (one setting explained)."""

from __future__ import annotations

from typing import Any

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.recipe.fields import EXTENDS, Field, catalogue
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.recipe.suggest import closest, nearest_path

SCHEMA_URL = "https://json-schema.org/draft/2020-12/schema"


def recipe_schema() -> dict[str, Any]:
    """JSON schema of a recipe file, for editors: with `extends`, and with `model` optional, which may come from there."""
    schema = Recipe.model_json_schema()
    suites = schema["$defs"]["EvaluateSpec"]["properties"]["suites"]
    bare = {"type": "string", "enum": list(suites["items"]["discriminator"]["mapping"])}
    suites["items"] = {"anyOf": [suites["items"], bare]}
    texts = {"type": "array", "items": {"type": "string"}}
    extends = {"anyOf": [{"type": "string"}, texts], "default": [], "description": catalogue()[0].text}
    properties = {EXTENDS: extends, **schema.pop("properties")}
    required = [name for name in schema.pop("required", []) if name != "model"]
    return {"$schema": SCHEMA_URL, **schema, "properties": properties, **({"required": required} if required else {})}


def find_setting(name: str) -> list[Field]:
    """Settings that a dotted path (list indices may be left out) or a bare name stands for.

    Returns:
        Several where methods differ in a setting, or a bare name exists more than once.

    Raises:
        InputError: there is none; the message has the nearest.
    """
    wanted = _bare(name)
    found = [item for item in catalogue() if _bare(item.path) == wanted] or [item for item in catalogue() if item.name == name]
    if found:
        return found
    last = name.split(".")[-1]
    word = closest(last, sorted({item.name for item in catalogue()}))
    hint = nearest_path(word, name.rpartition(".")[0]) if word else None
    raise InputError(f"there is no setting '{name}'." + (f" Did you mean '{hint}'?" if hint else " `qdm schema` prints all."), hint=hint)


def parts_of(field: Field) -> list[Field]:
    """The settings of a section, one level down; empty for a plain setting."""
    prefix = f"{_bare(field.path)}."
    return [item for item in catalogue() if _bare(item.path).startswith(prefix) and "." not in _bare(item.path)[len(prefix) :]]


def _bare(path: str) -> str:
    return ".".join(part for part in path.split(".") if part != "N" and not part.isdecimal())
