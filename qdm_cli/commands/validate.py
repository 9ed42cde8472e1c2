"""`qdm validate`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.commands._common import Session
from qdm_cli.commands._stages import complete_recipe
from qdm_cli.engine.errors import InputError, Problem, RecipeError
from qdm_cli.report import Result, plain_ascii

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.load import LoadedRecipe

_POSITION = re.compile(r"(?P<file>.+):(?P<line>\d+):(?P<col>\d+)")


def validate(
    ctx: typer.Context,
    recipes: Annotated[
        list[str], typer.Argument(metavar="RECIPE...", help="Files, bundled names, or - for stdin.", autocompletion=complete_recipe)
    ],
    strict_model: Annotated[bool, typer.Option("--strict-model", help="Also read the model's configuration and match every rule.")] = False,
    github: Annotated[bool, typer.Option("--github", help="Also print annotations for GitHub Actions on stderr.")] = False,
) -> Result:
    """Check recipes: every setting, and what settings mean together. Runs nothing; reports all problems of all recipes at once."""
    problems: list[Problem] = []
    rows: list[dict[str, Any]] = []
    for recipe in recipes:
        try:
            rows.append(_checked(ctx.obj, recipe, strict_model=strict_model))
        except InputError as error:
            problems += [problem if problem.where else _at(recipe, problem) for problem in error.problems]
    if problems:
        if github:
            _annotate(problems)
        raise RecipeError(problems)
    return Result(data=rows, line="\n".join(f"{row['recipe']}: valid ({', '.join(row['stages']) or 'no stage'})" for row in rows))


def _checked(session: Session, name: str, *, strict_model: bool) -> dict[str, Any]:
    from qdm_cli.engine.recipe import load_recipe, recipe_digest
    from qdm_cli.engine.recipe.checks import stages_of

    loaded = load_recipe(name)
    row: dict[str, Any] = {"recipe": name, "name": loaded.name, "digest": recipe_digest(loaded.recipe), "stages": stages_of(loaded.recipe)}
    return {**row, "layers": _match_rules(loaded, session)} if strict_model else row


def _match_rules(loaded: LoadedRecipe, session: Session) -> dict[str, int]:
    """How many layers each rule decides."""
    from qdm_cli.engine.plan import rule_hits

    try:
        return rule_hits(loaded.recipe, offline=session.offline, smoke=session.smoke)
    except InputError as error:
        raise loaded.placed(error) from None


def _at(recipe: str, problem: Problem) -> Problem:
    """A recipe that could not be read has no position in it."""
    return Problem(problem.message, recipe, problem.path, problem.hint)


def _annotate(problems: list[Problem]) -> None:
    """`::error file=r.yaml,line=5,col=3::message`, escaped as the runner wants it."""
    for problem in problems:
        match = _POSITION.fullmatch(problem.where or "")
        place = f"file={match['file']},line={match['line']},col={match['col']}" if match else f"file={problem.where}"
        text = (f"{problem.path}: " if problem.path else "") + problem.message
        if sys.stderr is not None:
            text = text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
            print(plain_ascii(f"::error {place}::{text}", sys.stderr), file=sys.stderr)
