"""`qdm cp`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from qdm_cli.commands._common import Session
from qdm_cli.commands._stages import complete_recipe
from qdm_cli.engine.errors import InputError
from qdm_cli.report import Result


def cp(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="A bundled recipe (qdm ls).", autocompletion=complete_recipe)],
    dest: Annotated[Path | None, typer.Argument(metavar="[DEST]", help="File or folder; NAME.yaml here if left out.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Resolve `extends` and write every default.")] = False,
) -> Result:
    """Copy a bundled recipe to edit it. Comments are kept; an existing file is replaced only with --yes."""
    from qdm_cli.engine.artifact import write_text
    from qdm_cli.engine.recipe.copy import copied_text, destination

    session: Session = ctx.obj
    text, path = copied_text(name, full=full), destination(name, dest)
    if path.exists() and not session.yes and not _confirmed(path):
        raise InputError(f"{path} exists. Choose another name, or replace it with --yes.")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return Result(data={"status": "done", "recipe": str(path.absolute())}, line=str(path.absolute()))


def _confirmed(path: Path) -> bool:
    """Asked only where somebody can answer."""
    if sys.stdin is None or sys.stderr is None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return False
    return typer.confirm(f"{path} exists. Replace it?", err=True)
