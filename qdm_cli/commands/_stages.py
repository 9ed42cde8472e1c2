"""What the stage commands share: their arguments, `--from`, `--out`, and the result they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.commands._common import Session
from qdm_cli.engine.errors import InputError, OutOfMemory, QdmError, RecipeError
from qdm_cli.report import Result

if TYPE_CHECKING:
    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.recipe import Recipe
    from qdm_cli.engine.recipe.load import LoadedRecipe
    from qdm_cli.engine.run import RunOutcome

GATE_EXIT = 5


def complete_recipe(incomplete: str) -> list[str]:
    """Bundled names for the shell; files are completed by the shell itself."""
    from qdm_cli.engine.recipe.bundled import bundled_names

    return [name for name in bundled_names() if name.startswith(incomplete)]


def complete_setting(incomplete: str) -> list[str]:
    """Dotted settings for the shell."""
    from qdm_cli.engine.recipe.fields import catalogue

    return sorted({f"{item.path}=" for item in catalogue() if item.path.startswith(incomplete)})


_RECIPE_HELP = "A file, the name of a bundled recipe (qdm ls), or - for YAML on stdin."
_OVERRIDES_HELP = "Settings to change, such as sampler.steps=10; KEY+=VALUE appends, ~KEY removes."
RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help=_RECIPE_HELP, autocompletion=complete_recipe)]
OverridesArgument = Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE", help=_OVERRIDES_HELP, autocompletion=complete_setting)]
SetOption = Annotated[list[str] | None, typer.Option("--set", "-s", metavar="KEY=VALUE", help="The same as KEY=VALUE.", show_default=False)]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="DIR|-", help="Input artifact; - reads the path that the step before printed.", show_default=False),
]
OutOption = Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Folder of the artifact.", show_default=False)]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Only say what would happen (qdm plan).")]


def stage_command(
    ctx: typer.Context, stage: str, recipe: str, overrides: list[str], *, source: str | None, out: Path | None, dry_run: bool
) -> Result:
    """Load the recipe, run one stage, describe its artifact."""
    session: Session = ctx.obj
    if recipe == "-" and source == "-":
        raise InputError("the recipe and --from cannot both be read from stdin")
    parent = source_artifact(source)
    loaded, adapted = load(session, recipe, overrides)
    if dry_run:
        return dry_run_of(ctx, recipe, overrides)
    from qdm_cli.engine.run import run_stage

    with explained(session, loaded, adapted):
        outcome = run_stage(stage, adapted, source=parent, out=out, **run_options(session, loaded, (recipe, *overrides)))
    return outcome_result([outcome])


@contextmanager
def explained(session: Session, loaded: LoadedRecipe, recipe: Recipe) -> Iterator[None]:
    """Give errors about a setting its position in the recipe, and those about memory the plan's estimate.

    Raises:
        OutOfMemory: before anything runs, where `device.max_cpu` is set and the estimate exceeds it.
    """
    if recipe.device.max_cpu is not None:
        _refuse_too_large(session, recipe)
    try:
        yield
    except OutOfMemory as error:
        stage = (error.problems[0].path or "").split(".")[0]
        raise OutOfMemory(f"{error}{_estimate(session, recipe, stage)}", path=error.problems[0].path) from error
    except InputError as error:
        if isinstance(error, RecipeError) or not all(problem.path for problem in error.problems):
            raise
        raise loaded.placed(error) from error


def _refuse_too_large(session: Session, recipe: Recipe) -> None:
    from qdm_cli.engine.plan import make_plan

    for failure in make_plan(recipe, offline=session.offline, smoke=session.smoke).failures:
        if failure["exit_code"] == OutOfMemory.exit_code:
            raise OutOfMemory(str(failure["message"]))


def _estimate(session: Session, recipe: Recipe, stage: str) -> str:
    """` (qdm plan estimates 3.1 GB)`, or nothing where the plan has none."""
    from qdm_cli.engine.plan import make_plan

    try:
        peak = make_plan(recipe, offline=session.offline, smoke=session.smoke).memory[stage]["peak"]
    except (QdmError, KeyError):
        return ""
    return f" (qdm plan estimates {peak / 1e9:.1f} GB)"


def load(session: Session, recipe: str, overrides: list[str]) -> tuple[LoadedRecipe, Recipe]:
    """The recipe as given, and with `--seed`, `--device` and `--offload` applied."""
    from qdm_cli.engine.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides)
    adapted = loaded.recipe
    if session.seed is not None:
        adapted = adapted.model_copy(update={"seed": session.seed})
    changed = {name: value for name, value in (("name", session.device), ("offload", session.offload)) if value is not None}
    if changed:
        adapted = adapted.model_copy(update={"device": adapted.device.model_copy(update=changed)})
    return loaded, adapted


def run_options(session: Session, loaded: LoadedRecipe, recipe_args: tuple[str, ...]) -> dict[str, Any]:
    """Keyword arguments of `run_stage` and `run_recipe` that come from the command line."""
    return {
        "fresh": session.fresh,
        "wait": session.wait,
        "smoke": session.smoke,
        "offline": session.offline,
        "events": session.terminal,
        "command": ("qdm", *session.argv),
        "recipe_args": recipe_args,
        "recipe_text": loaded.text,
        **session.engine,
    }


def dry_run_of(ctx: typer.Context, recipe: str, overrides: list[str]) -> Result:
    """What `qdm plan` prints for the same recipe."""
    from qdm_cli.commands.plan import plan

    return plan(ctx, recipe, overrides)


def source_artifact(source: str | None) -> Artifact | None:
    """The artifact that `--from` names; `-` reads it from stdin.

    Raises:
        InputError: stdin is a terminal, closed, empty or names no artifact.
    """
    if source is None:
        return None
    from qdm_cli.engine.artifact import open_artifact

    return open_artifact(_read_source() if source == "-" else source)


def _read_source() -> str:
    stream = sys.stdin
    if stream is not None and not stream.closed and stream.isatty():
        raise InputError("--from - reads the path that the step before printed, but stdin is a terminal")
    return path_from("" if stream is None or stream.closed else os.fsdecode(stream.buffer.read()))


def path_from(text: str) -> str:
    """The artifact's path in what a step printed: a JSON object with `artifact`, else the last line that is not empty.

    Raises:
        InputError: nothing there, or the step before failed.
    """
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise InputError("--from -: stdin is empty, the previous step produced nothing")
    for candidate in (text, lines[-1]):
        if candidate.lstrip().startswith("{"):
            try:
                return _artifact_of(json.loads(candidate))
            except ValueError:
                continue
    if lines[-1].lstrip().startswith("{"):
        raise InputError("--from -: the last line on stdin is neither a path nor a JSON object")
    return lines[-1]


def _artifact_of(value: Any) -> str:
    artifact = value.get("artifact") if isinstance(value, dict) else None
    if isinstance(artifact, str):
        return artifact
    errors = value.get("errors") if isinstance(value, dict) else None
    why = f": {errors[0].get('message')}" if errors else ""
    raise InputError(f"--from -: the previous step produced nothing{why}")


def outcome_result(outcomes: list[RunOutcome]) -> Result:
    """One line or object for the last export, else the last stage; a failed gate exits 5 all the same."""
    shown = next((outcome for outcome in reversed(outcomes) if outcome.stage == "export"), outcomes[-1])
    gates = [outcome.artifact.manifest.gate for outcome in outcomes if outcome.artifact.manifest.gate]
    metrics = {name: value for outcome in outcomes for name, value in outcome.artifact.manifest.metrics.items()}
    artifact = shown.artifact
    data: dict[str, Any] = {
        "status": "failed" if gates else "cached" if all(outcome.status == "cached" for outcome in outcomes) else "done",
        "artifact": str(artifact.result),
        "manifest": str(artifact.folder / "qdm.json"),
        "digest": artifact.manifest.digest,
        "metrics": metrics,
    }
    if len(outcomes) > 1:
        data["stages"] = [{"stage": o.stage, "status": o.status, "artifact": str(o.artifact.result)} for o in outcomes]
    if gates:
        data |= {"exit_code": GATE_EXIT, "gates": gates}
    return Result(data=data, line=str(artifact.result), exit_code=GATE_EXIT if gates else 0, notes=tuple(gates))
