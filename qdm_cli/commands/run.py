"""`qdm run`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qdm_cli.commands._common import Session
from qdm_cli.commands._stages import (
    DryRunOption,
    FromOption,
    OutOption,
    SetOption,
    complete_recipe,
    dry_run_of,
    explained,
    load,
    outcome_result,
    run_options,
    source_artifact,
)
from qdm_cli.engine.errors import InputError
from qdm_cli.report import Result

_WORDS_HELP = "Recipes, in order, and settings to change in all of them, such as sampler.steps=10."


def run(
    ctx: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="RECIPE|KEY=VALUE", help=_WORDS_HELP, autocompletion=complete_recipe)],
    settings: SetOption = None,
    source: FromOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> Result:
    """Run all stages that the recipes have, in order; several recipes are chained, each fed by the one before.

    Prints the path of the export, or of the last stage where there is none. --out replaces runs/<name>.
    """
    recipes = [word for word in words if not is_override(word)]
    changes = [*(word for word in words if is_override(word)), *(settings or [])]
    if not recipes:
        raise InputError("which recipe? Name a file or one of `qdm ls`")
    if recipes.count("-") + (source == "-") > 1:
        raise InputError("only one thing can be read from stdin")
    if len(recipes) > 1 and out is not None:
        raise InputError("--out takes one recipe; chained recipes are written to runs/<name> each")
    return _chain(ctx, recipes, changes, source=source, out=out, dry_run=dry_run)


def _chain(ctx: typer.Context, recipes: list[str], changes: list[str], *, source: str | None, out: Path | None, dry_run: bool) -> Result:
    """Load all recipes before the first stage starts, so that the last one's mistakes cost no hours."""
    session: Session = ctx.obj
    if dry_run:
        return dry_run_of(ctx, recipes[0], changes)
    from qdm_cli.engine.run import RunOutcome, run_recipe

    artifact = source_artifact(source)
    loaded = [(name, *load(session, name, changes)) for name in recipes]
    outcomes: list[RunOutcome] = []
    for name, given, recipe in loaded:
        with explained(session, given, recipe):
            outcomes += run_recipe(recipe, source=artifact, out=out, **run_options(session, given, (name, *changes)))
        artifact = next((o.artifact for o in reversed(outcomes) if o.stage != "evaluate"), artifact)
    return outcome_result(outcomes)


def is_override(word: str) -> bool:
    """`KEY=VALUE`, `KEY+=VALUE` or `~KEY`; a file's path may hold an equals sign behind a separator."""
    name = word.split("=")[0]
    return "/" not in name and (word.startswith("~") or "=" in word)
