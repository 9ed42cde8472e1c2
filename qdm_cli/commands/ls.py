"""`qdm ls`."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_cli.engine.recipe.bundled import Bundled

_COLUMNS = ("name", "family", "method", "bits", "gpu", "size", "quality", "what")


def ls() -> Result:
    """Bundled recipes: what they compress, how, to how many bits, and whether they need a GPU."""
    from qdm_cli.engine.recipe.bundled import bundled

    recipes = bundled()
    return Result(data=[asdict(recipe) for recipe in recipes], human=lambda console: _show(console, recipes))


def _show(console: Console, recipes: list[Bundled]) -> None:
    """Columns that no recipe fills are left out."""
    from rich.table import Table
    from rich.text import Text

    shown = [name for name in _COLUMNS if any(getattr(recipe, name) for recipe in recipes)]
    table = Table(box=None, pad_edge=False)
    for name in shown:
        table.add_column(name, no_wrap=name in ("name", "method", "bits"))
    for recipe in recipes:
        table.add_row(*(Text(getattr(recipe, name)) for name in shown))
    console.print(table)
