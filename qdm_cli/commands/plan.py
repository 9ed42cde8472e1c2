"""`qdm plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.commands._common import Session
from qdm_cli.commands._stages import OverridesArgument, RecipeArgument, SetOption, load
from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_cli.engine.plan import Plan

_LAYER_COLUMNS = ("name", "type", "shape", "bits", "scales", "bytes", "rule")


def plan(
    ctx: typer.Context,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    settings: SetOption = None,
    measure: Annotated[bool, typer.Option("--measure", help="Load the model and time three calls of each kind.")] = False,
    fetch: Annotated[bool, typer.Option("--fetch", help="Download the model files that are missing.")] = False,
) -> Result:
    """What a recipe would do: bits and bytes of every layer, denoiser calls, time, memory, missing weights. Writes nothing.

    Exits with the code that the run would fail with, if the plan can tell that it would.
    """
    from qdm_cli.engine.errors import InputError
    from qdm_cli.engine.plan import make_plan

    session: Session = ctx.obj
    loaded, adapted = load(session, recipe, [*(overrides or []), *(settings or [])])
    try:
        if fetch:
            from qdm_cli.engine.plan.missing import fetch as fetch_model

            fetch_model(adapted, offline=session.offline)
        made = make_plan(adapted, measure=measure, offline=session.offline, smoke=session.smoke)
    except InputError as error:
        raise loaded.placed(error) from None
    data = {**made.to_dict(), "status": "failed" if made.failures else "done"}
    notes = tuple(f"would fail (exit {failure['exit_code']}): {failure['message']}" for failure in made.failures)
    return Result(data=data, human=lambda console: _show(console, made), exit_code=made.exit_code, notes=notes)


def _show(console: Console, made: Plan) -> None:
    from rich.table import Table
    from rich.text import Text

    for title, columns, rows in (
        ("layers", _LAYER_COLUMNS, [_layer(row) for row in made.layers]),
        ("denoiser calls", ("stage", "phase", "calls", "batch", "time"), [_calls(row) for row in made.calls]),
        ("memory (CPU, estimated)", ("stage", "part", "size"), _memory(made)),
        ("missing weights", ("file", "from", "without it"), [_missing(item) for item in made.missing]),
    ):
        if rows:
            table = Table(*columns, box=None, pad_edge=False, title=title, title_justify="left")
            for row in rows:
                table.add_row(*map(Text, row))
            console.print(table)
            console.print()
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in [*_facts(made), *(("note", note) for note in made.notes)]:
        facts.add_row(name, Text(value))
    console.print(facts)


def _facts(made: Plan) -> list[tuple[str, str]]:
    model, skipped = made.model, sum(bool(row["skipped_why"]) for row in made.layers)
    parts = ", ".join(f"{name} {size(count)}" for name, count in made.bytes.items() if count)
    return [
        ("model", f"{model['id']}: {model['class']} of a {model['pipeline']}, {model['parameters'] / 1e6:.1f} M parameters"),
        ("stages", ", ".join(made.stages) or "none"),
        ("layers", f"{len(made.layers) - skipped} quantized, {skipped} in full precision"),
        ("export", f"target {made.target}, {made.rows} rows per step table"),
        ("denoiser", f"{size(made.total_bytes)}, {made.total_bytes / made.fp16_bytes:.3f} of fp16 ({size(made.fp16_bytes)}): {parts}"),
        *_cache(made.cache),
    ]


def _cache(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    partial = ", ".join(f"{name} {count:.3g} G" for name, count in found["partial_g"].items())
    mean = "the planner chooses the steps by measured time"
    if found["mean_g"] is not None:
        share = found["mean_g"] / found["full_g"]
        mean = f"{found['full_steps']} of {found['steps']} steps in full: mean {found['mean_g']:.4g} G, {share:.3f} of uncached"
    return [("cache", f"multiply-adds of a full call {found['full_g']:.4g} G, partial {partial}; {mean}")]


def _layer(row: dict[str, Any]) -> tuple[str, ...]:
    shape = "x".join(map(str, row["shape"]))
    if row["skipped_why"]:
        return row["name"], row["type"], shape, "float", "", size(row["bytes"]), row["skipped_why"]
    bits = f"W{row['bits_w']}" + (f"A{row['bits_a']}" if row["bits_a"] else "")
    scales = f"group {row['group_size']}" if row["granularity"] == "group" else row["granularity"]
    scales += "" if row["bits_a"] is None else ", per step" if row["timestep_aware"] else f", {row['act_mode']}"
    return row["name"], row["type"], shape, bits, scales, size(row["bytes"]), row["rule"]


def _calls(row: dict[str, Any]) -> tuple[str, ...]:
    time = "unknown (--measure)" if row["seconds"] is None else duration(row["seconds"])
    return row["stage"], row["phase"] + (" (with backward)" if row["training"] else ""), f"{row['count']:,}", str(row["batch"]), time


def _memory(made: Plan) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for stage, parts in made.memory.items():
        rows.append((stage, "peak", size(parts["peak"])))
        rows += [("", part, size(count)) for part, count in parts.items() if count and part != "peak"]
    return rows


def _missing(item: Any) -> tuple[str, ...]:
    return item.file, item.id, "nothing runs" if item.needed else "a metric is null"


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as on disks."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def duration(seconds: float) -> str:
    """Seconds for people."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes / 60:.1f} h"
