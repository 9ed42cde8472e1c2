"""`qdm bench`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_cli.commands._common import Session

_WHAT = (
    "A folder of `qdm export`, or shapes: sd15, sdxl, ldm4, dit256, dit512, flux, all, linear:MxNxK, conv2d:BATCHxCHANNELSxSIDExFILTERS."
)
_BITS = "Weight bits to measure (may be repeated); 8 and 4 without it."


def bench(
    ctx: typer.Context,
    what: Annotated[list[str], typer.Argument(metavar="FOLDER|SHAPES...", help=_WHAT)],
    bits: Annotated[list[int] | None, typer.Option("--bits", metavar="N", help=_BITS, show_default=False)] = None,
    denoisers: Annotated[bool, typer.Option("--denoisers", help="Whole denoisers of the named models too, random weights.")] = False,
    only_denoisers: Annotated[bool, typer.Option("--only-denoisers", help="Whole denoisers alone.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile of baseline and layer too (minutes of warm-up).")] = False,
    peers: Annotated[bool, typer.Option("--peers/--no-peers", help="Time rivals that are installed in the same run.")] = True,
    profile: Annotated[bool, typer.Option("--profile", help="Also list the operators of each denoiser by their time.")] = False,
    full: Annotated[bool, typer.Option("--full", help="On a CPU: the model's own number of rows, however long it takes.")] = False,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure tiles of these layers on this GPU and keep them in the user's file.")
    ] = False,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", min=1, help="Time for --tune, compilation included.")] = 120.0,
    rounds: Annotated[int | None, typer.Option("--rounds", metavar="N", min=1, help="Timed calls of each candidate.")] = None,
    threads: Annotated[
        int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads; torch's own number without it.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Write DIR/<device>/*.json after every row.")] = None,
) -> Result:
    """Time layers or a whole exported model, each behind a correctness gate.

    Of shapes: milliseconds, ratio to bf16 (fp32 where bf16 is not native), share of the roofline. Of an export: median and tenth and
    ninetieth percentile of one denoiser call, load and first call apart, and per layer the chosen kernel.
    """
    session: Session = ctx.obj
    device = _device(session.device)
    if tune:
        from qdm_cli.engine.bench.tune import tune_layers

        found = tune_layers(what, tuple(bits or (8, 4)), device=device, seconds=seconds, say=session.terminal.log)
        left = found["not_reached"]
        notes = (f"{left} layers were not reached in {seconds:g} s: run it again with more --seconds",) if left else ()
        return Result(data=found, human=lambda console: console.print(found["file"], markup=False), notes=notes)
    if len(what) == 1 and Path(what[0]).exists():
        from qdm_cli.engine.bench.export import bench_export

        report = bench_export(Path(what[0]), device=device, rounds=rounds, threads=threads, compiled=compiled)
        return Result(data=report, human=lambda console: _show_export(console, report))
    from qdm_cli.engine.bench.run import BenchPlan, run_bench

    plan = BenchPlan(
        tuple(what),
        tuple(bits or (8, 4)),
        denoisers=denoisers or only_denoisers,
        layers=not only_denoisers,
        compiled=compiled,
        peers=peers,
        profile=profile,
        rounds=rounds,
        full=full,
        device=device,
        threads=threads,
    )
    report = run_bench(plan, out, session.terminal.log)
    failed = sum(row["gate"] not in ("passed", "skipped") for row in report["rows"])
    notes = (f"gate failed: {failed} rows are not the reference's",) if failed else ()
    return Result(data=report, human=lambda console: _show(console, report), exit_code=5 if failed else 0, notes=notes)


def _device(named: str | None) -> str:
    import torch

    if named and named != "auto":
        return named
    return "cuda" if torch.cuda.is_available() else "cpu"


def _show(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    console.print(f"{report['device']}, baseline {report['baseline']}, {report['clock']}, threads {report['threads']}", markup=False)
    table = Table("model", "layer", "format", "M", "N", "K", "float ms", "qdm ms", "auto", "exact", "integer", "roof", "kernel", box=None)
    for row in report["rows"]:
        table.add_row(*_cells(row))
    console.print(table)


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    sizes = tuple(str(value) for value in (row.get("rows", ""), row.get("outputs", ""), row.get("terms", "")))
    head = (row["model"], row.get("layer", "whole denoiser"), row["format"], *sizes)
    if "times" not in row:
        return (*head, *[""] * 6, row.get("why", row["gate"]))
    times, ratios = row["times"], row["ratios"]
    shares = row.get("roofline_share", {})
    numbers = tuple(f"{times[name]['best_ms']:.2f}" for name in ("float", "auto"))
    gains = tuple(f"{ratios[name]:.2f}x" if name in ratios else "" for name in ("auto", "exact", "integer"))
    kernel = row.get("chosen") or f"{row['layers']['integer']} integer, {row['layers']['float']} float"
    return (*head, *numbers, *gains, f"{shares['integer']:.0%}" if "integer" in shares else "", kernel)


def _show_export(console: Console, report: dict[str, Any]) -> None:
    from rich.table import Table

    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in report["facts"].items():
        facts.add_row(name.replace("_", " "), f"{value:,.3f}" if isinstance(value, float) else str(value))
    console.print(facts)
    table = Table("layers", "type", "K x N", "bits", "kernel", "why not integer", box=None, pad_edge=False)
    for group in report["layers"]:
        table.add_row(*(str(group[key]) for key in ("count", "type", "shape", "bits", "kernel", "why_not")))
    console.print(table)
