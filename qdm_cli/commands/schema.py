"""`qdm schema`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.commands._stages import complete_setting
from qdm_cli.report import Result

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.fields import Field


def _complete(incomplete: str) -> list[str]:
    return [setting.rstrip("=") for setting in complete_setting(incomplete)]


FieldArgument = Annotated[
    str | None,
    typer.Argument(metavar="[FIELD]", help="A setting like sampler.steps; or recipe, manifest, metrics, output.", autocompletion=_complete),
]


def schema(field: FieldArgument = None) -> Result:
    """The JSON schema of recipes, manifests, metrics or JSON output; or one setting: what it is, its type and its default."""
    from qdm_cli.engine.recipe.explain import find_setting

    if field in (None, "recipe", "manifest", "metrics", "output"):
        return Result(data=_json_schema(field or "recipe"), raw=True)
    found = find_setting(str(field))
    return Result(data=[_facts(item) for item in found], line="\n\n".join(_text(item) for item in found))


def _json_schema(kind: str) -> dict[str, Any]:
    from qdm_cli.engine.recipe.explain import SCHEMA_URL, recipe_schema

    if kind == "recipe":
        return recipe_schema()
    if kind == "manifest":
        from qdm_cli.engine.artifact import Manifest

        return {"$schema": SCHEMA_URL, **Manifest.model_json_schema(by_alias=True)}
    if kind == "output":
        from qdm_cli.commands._outputs import OUTPUT

        return {"$schema": SCHEMA_URL, **OUTPUT.json_schema(by_alias=True)}
    from qdm_cli.engine.evaluation.result import Evaluation

    return {"$schema": SCHEMA_URL, **Evaluation.model_json_schema(by_alias=True)}


def _facts(item: Field) -> dict[str, Any]:
    facts = {"path": item.path, "method": item.owner, "type": item.type, "required": item.required}
    return {**facts, "default": item.default, "description": item.text}


def _text(item: Field) -> str:
    """One setting for people; a section also lists its settings."""
    from qdm_cli.engine.recipe.explain import parts_of
    from qdm_cli.engine.recipe.fields import yaml_text

    owner = f" (method {item.owner})" if item.owner else ""
    default = "none, it must be given" if item.required else yaml_text(item.default)
    lines = [f"{item.path}{owner}", f"  {' '.join(item.text.split())}", f"  type: {item.type}", f"  default: {default}"]
    parts = parts_of(item)
    width = max((len(part.name) for part in parts), default=0)
    lines += [f"  {part.name:{width}}  {' '.join(part.text.split())}" + (f" (method {part.owner})" if part.owner else "") for part in parts]
    return "\n".join(lines)
