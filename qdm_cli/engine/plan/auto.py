"""What `quantize.auto` would decide, where a sensitivity table is there to decide from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.auto_bits import decide
from qdm_cli.engine.plan.table import stored_table
from qdm_cli.engine.quant.sensitivity import SENSITIVITY_FILE, read_sensitivity
from qdm_cli.engine.runtime.size import bytes_by_part

if TYPE_CHECKING:
    from qdm_cli.engine.quant.state import LayerDecision
    from qdm_cli.engine.recipe.schema import Recipe

RUNS = Path("runs")


def with_auto(
    recipe: Recipe, component: str, denoiser: nn.Module, decisions: list[LayerDecision], rows: int, *, smoke: bool
) -> tuple[list[LayerDecision], list[str]]:
    """Decisions with the bits that the table of the recipe or of its last calibrate gives, and what is to be said about it.

    Raises:
        InputError: a named table that is of another model, or a budget that cannot be met.
    """
    auto = recipe.quantize.auto
    if auto is None:
        return decisions, []
    path = Path(auto.table).expanduser() if auto.table else RUNS / _run_name(recipe, smoke) / "latest-calibrate" / SENSITIVITY_FILE
    if auto.table is None and not path.is_file():
        return decisions, ["quantize.auto decides the bits when calibrate has measured the sensitivity; shown are the policy's"]

    def size_of(chosen: Sequence[LayerDecision]) -> int:
        return sum(bytes_by_part(stored_table(recipe, component, denoiser, list(chosen), rows, smoke=smoke), chosen).values())

    try:
        result = decide(decisions, auto, read_sensitivity(path), denoiser, rows, size_of)
    except InputError as error:
        if auto.table is not None or error.problems[0].path != "quantize.auto.table":
            raise
        return decisions, [f"{path} is of another model; shown are the policy's bits"]
    return result.decisions, [f"bits by quantize.auto from {path}: {result.used:,.6g} of {result.budget:,.6g}"]


def _run_name(recipe: Recipe, smoke: bool) -> str:
    return (recipe.name or "recipe") + ("-smoke" if smoke else "")
