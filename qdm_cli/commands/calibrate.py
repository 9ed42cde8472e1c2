"""`qdm calibrate`."""

from __future__ import annotations

import typer

from qdm_cli.commands._stages import DryRunOption, FromOption, OutOption, OverridesArgument, RecipeArgument, SetOption, stage_command
from qdm_cli.report import Result


def calibrate(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    source: FromOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> Result:
    """Run the full-precision model, keep its trajectories, and set every range from them."""
    changes = [*(overrides or []), *(settings or [])]
    return stage_command(ctx, "calibrate", recipe, changes, source=source, out=out, dry_run=dry_run)
