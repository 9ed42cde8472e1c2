"""`qdm export`."""

from __future__ import annotations

import typer

from qdm_cli.commands._stages import DryRunOption, FromOption, OutOption, OverridesArgument, RecipeArgument, SetOption, stage_command
from qdm_cli.report import Result


def export(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    source: FromOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> Result:
    """Write a diffusers folder with integer weights, and check it in a fresh process before it is published."""
    changes = [*(overrides or []), *(settings or [])]
    return stage_command(ctx, "export", recipe, changes, source=source, out=out, dry_run=dry_run)
