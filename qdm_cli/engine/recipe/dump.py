"""A recipe with every default written out: as YAML, as a digest, as plain data."""

from __future__ import annotations

import hashlib
import io
import json
from typing import Any

from ruamel.yaml import YAML

from qdm_cli.engine.recipe.schema import Recipe


def dump_resolved(recipe: Recipe) -> str:
    """YAML of everything, in the order of the schema; `load_recipe` reads it back to an equal recipe."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 10_000
    buffer = io.StringIO()
    yaml.dump(_method_first(recipe.model_dump(mode="json")), buffer)
    return buffer.getvalue()


def _method_first(value: Any) -> Any:
    """`method` says what the rest of its section is about."""
    if isinstance(value, dict):
        return {key: _method_first(value[key]) for key in sorted(value, key=lambda key: key != "method")}
    return [_method_first(item) for item in value] if isinstance(value, list) else value


def recipe_digest(recipe: Recipe) -> str:
    """sha256 (hex) of the resolved recipe as canonical JSON: independent of comments, key order and spelling."""
    text = json.dumps(recipe.model_dump(mode="json"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
