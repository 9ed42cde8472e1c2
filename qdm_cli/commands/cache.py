"""`qdm cache`."""

from __future__ import annotations

import typer

from qdm_cli.commands._stages import DryRunOption, FromOption, OutOption, OverridesArgument, RecipeArgument, SetOption, stage_command
from qdm_cli.report import Result


def cache(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    source: FromOption = None,
    out: OutOption = None,
    dry_run: DryRunOption = False,
) -> Result:
    """Choose which denoising steps reuse features; after finetune or calibrate, or on the plain model."""
    changes = [*(overrides or []), *(settings or [])]
    return stage_command(ctx, "cache", recipe, changes, source=source, out=out, dry_run=dry_run)
