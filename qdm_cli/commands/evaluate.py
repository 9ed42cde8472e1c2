"""`qdm evaluate`."""

from __future__ import annotations

import typer

from qdm_cli.commands._stages import DryRunOption, FromOption, OutOption, OverridesArgument, RecipeArgument, SetOption, stage_command
from qdm_cli.report import Result


def evaluate(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    source: FromOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> Result:
    """Judge an artifact by images and numbers; prints the path of its metrics.json."""
    changes = [*(overrides or []), *(settings or [])]
    return stage_command(ctx, "evaluate", recipe, changes, source=source, out=out, dry_run=dry_run)
