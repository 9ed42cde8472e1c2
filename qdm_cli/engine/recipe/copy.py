"""A bundled recipe as a file to edit: as it is, or with everything written out and its comments kept."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.representer import RoundTripRepresenter

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.recipe.bundled import bundled_names, bundled_text
from qdm_cli.engine.recipe.dump import dump_resolved
from qdm_cli.engine.recipe.fields import EXTENDS
from qdm_cli.engine.recipe.load import load_recipe
from qdm_cli.engine.recipe.suggest import closest


def copied_text(name: str, *, full: bool = False) -> str:
    """Text of a bundled recipe.

    Args:
        full: `extends` resolved and every default written. Stages that the recipe leaves out stay out.

    Raises:
        InputError: no bundled recipe has this name.
    """
    names = bundled_names()
    if name not in names:
        hint = closest(name, names)
        raise InputError(
            f"there is no bundled recipe '{name}'." + (f" Did you mean '{hint}'?" if hint else " `qdm ls` lists them."), hint=hint
        )
    text = bundled_text(name)
    return full_text(text, name) if full else text


def full_text(text: str, name: str) -> str:
    """A bundled recipe with all its settings in it. Its own lines keep their order and comments; what was added follows them."""
    yaml = YAML(typ="rt")
    yaml.width = 10_000
    yaml.preserve_quotes = True
    yaml.Representer = _WithNull
    tree = yaml.load(text)
    complete = {key: value for key, value in yaml.load(dump_resolved(load_recipe(name).recipe)).items() if value is not None}
    comment = tree.ca.comment
    tree.pop(EXTENDS, None)
    _complete_(tree, complete)
    tree.ca.comment = comment
    buffer = io.StringIO()
    yaml.dump(tree, buffer)
    return buffer.getvalue()


class _WithNull(RoundTripRepresenter):
    """Writes `null` where ruamel writes nothing: an empty value looks forgotten."""


_WithNull.add_representer(type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null"))


def _complete_(tree: CommentedMap, complete: dict[str, Any]) -> None:
    """Set what differs and add what is missing, section by section, each behind the setting that precedes it in the schema."""
    before: str | None = None
    for key, value in complete.items():
        if isinstance(value, dict) and isinstance(tree.get(key), CommentedMap):
            _complete_(tree[key], value)
        elif key in tree and tree[key] != value:
            tree[key] = value
        elif key not in tree:
            tree.insert(0 if before is None else list(tree).index(before) + 1, key, value)
        before = key


def destination(name: str, dest: Path | None) -> Path:
    """Where a copy goes: NAME.yaml here, in the folder `dest`, or the file `dest`."""
    file = f"{name.rsplit('/', 1)[-1]}.yaml"
    if dest is None:
        return Path(file)
    return dest / file if dest.is_dir() else dest
