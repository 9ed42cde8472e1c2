"""`qdm diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_cli.engine.evaluation.diff import Difference, LayerChange, MetricRow

GATE_EXIT = 5
_SHOWN = 40
_FAIL_IF = "METRIC OP NUMBER; true = exit 5. METRIC is B's value, METRIC_change = B - A, METRIC_ratio = B / A, or layers_changed."
_SUITE = "Compare only this suite (may be repeated), such as fidelity."


def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="An artifact, a run folder or a metrics.json.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The same, of what is compared with it.")],
    fail_if: Annotated[list[str] | None, typer.Option("--fail-if", metavar="EXPR", help=_FAIL_IF, show_default=False)] = None,
    suite: Annotated[list[str] | None, typer.Option("--suite", metavar="NAME", help=_SUITE, show_default=False)] = None,
) -> Result:
    """What two artifacts, runs or metrics.json differ in: settings, layers, metrics, images, and which is better by each metric.

    Of two run folders the furthest stage that both have is compared. Evaluations of unlike protocols are refused (exit 2).
    """
    from qdm_cli.engine.errors import InputError
    from qdm_cli.engine.evaluation.diff import compare_paths
    from qdm_cli.engine.evaluation.names import METRICS

    known = sorted({metric.suite for metric in METRICS.values()})
    if unknown := [name for name in suite or () if name not in known]:
        raise InputError(f"--suite {unknown[0]}: no such suite ({', '.join(known)})")
    found = compare_paths(a, b, suites=suite or (), fail_if=fail_if or ())
    code = GATE_EXIT if found.gates else 0
    return Result(
        data=found.to_dict(), human=lambda console: _show(console, found), line=verdict(found), exit_code=code, notes=_notes(found)
    )


def _notes(found: Difference) -> tuple[str, ...]:
    return tuple(found.notes) + tuple(f"gate failed: {gate}" for gate in found.gates)


def verdict(found: Difference) -> str:
    """One line: how many metrics each wins and what else differs."""
    wins = found.wins
    judged = sum(wins.values())
    different = sum(not pair.equal for pair in found.images)
    counts = [
        f"{len(found.fields)} fields differ",
        f"{len(found.layers)} layers differ",
        f"{different} of {len(found.images)} images differ" if found.images else "",
    ]
    head = (
        f"B is better in {wins['b']} of {judged} metrics, A in {wins['a']}, equal in {wins['equal']}" if judged else "no metric to judge by"
    )
    return "; ".join([head, *filter(None, counts)])


def _show(console: Console, found: Difference) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print(f"A  {found.a}\nB  {found.b}\n", markup=False)
    for title, columns, rows in (
        ("settings", ("field", "A", "B"), [(row.field, _text(row.a), _text(row.b)) for row in found.fields]),
        ("layers", ("layer", "change"), [(layer.name, _layer(layer)) for layer in found.layers]),
        ("metrics", ("metric", "A", "B", "change", "better"), [_metric(row) for row in found.metrics]),
        ("images", ("seed", "PSNR of B against A"), [(pair.image, _psnr(pair.psnr_db)) for pair in found.images]),
    ):
        if rows:
            table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
            for row in rows[:_SHOWN]:
                table.add_row(*map(Text, row))
            console.print(table)
            if len(rows) > _SHOWN:
                console.print(f"... and {len(rows) - _SHOWN} more (--format json has all)", markup=False)
            console.print()
    console.print(verdict(found), markup=False)


def _metric(row: MetricRow) -> tuple[str, ...]:
    better = {"a": "A", "b": "B", "equal": "equal", None: ""}[row.winner]
    change = "" if row.change is None else f"{row.change:+.4g}" + (f" ({row.ratio - 1:+.1%})" if row.ratio else "")
    return row.name, _text(row.a), _text(row.b), f"{change} {row.unit}".strip(), better


def _layer(layer: LayerChange) -> str:
    if layer.only_in:
        return f"only in {layer.only_in.upper()}"
    return ", ".join(f"{name} {_text(a)} -> {_text(b)}" for name, (a, b) in layer.changes.items())


def _psnr(value: float | None) -> str:
    return "equal" if value is None else f"{value:.2f} dB"


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)
