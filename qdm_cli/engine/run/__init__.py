"""Running recipes: `run_stage`, `run_recipe`."""

from qdm_cli.engine.run.failure import StageFailed, Terminated
from qdm_cli.engine.run.smoke import smoke_recipe
from qdm_cli.engine.run.stage import STAGES, Options, RunOutcome, run_recipe, run_stage

__all__ = ["STAGES", "Options", "RunOutcome", "StageFailed", "Terminated", "run_recipe", "run_stage", "smoke_recipe"]
