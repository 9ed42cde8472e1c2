"""`qdm inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qdm_cli.report import Result

if TYPE_CHECKING:
    from rich.console import Console

    from qdm_cli.engine.artifact import Artifact

_COLUMNS = (
    "name",
    "type",
    "shape",
    "bits_w",
    "bits_a",
    "granularity",
    "split",
    "pre_scale",
    "timestep_rows",
    "bytes",
    "rule",
    "skipped_why",
)
_HERE = ("kernel", "why_not")  # of this machine


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="An artifact, or a file inside it.")],
    layers: Annotated[bool, typer.Option("--layers", help="One line per layer.")] = False,
) -> Result:
    """Check every file of an artifact and say what it holds: manifest, bytes by part, layers.

    With --layers, an export's layers also tell which arithmetic this machine runs them in, and why not integers.
    """
    from qdm_cli.engine.artifact import open_artifact

    artifact = open_artifact(folder, full=True)
    data = artifact.manifest.model_dump(mode="json", by_alias=True)
    data["folder"] = str(artifact.folder)
    data["bytes"] = sum(entry.bytes for entry in artifact.manifest.files.values())
    data["bits"] = bits_summary(artifact.manifest.layers)
    data["schedule"] = schedule_summary(artifact)
    if layers and artifact.manifest.kind == "exported":
        data["layers"] = _with_kernels(data["layers"], artifact.folder)
    return Result(data=data, human=lambda console: _show(console, artifact, data, layers=layers))


def _with_kernels(layers: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Rows of an export with `kernel` and `why_not` of this machine."""
    from qdm_cli.engine.runtime.choice import choices_here

    chosen = choices_here(folder)
    return [
        {**row, "kernel": chosen[row["name"]].kernel, "why_not": chosen[row["name"]].why_not} if row.get("name") in chosen else row
        for row in layers
    ]


def schedule_summary(artifact: Artifact) -> dict[str, Any] | None:
    """What a cache schedule does, with the step mask that other tools read; None = the artifact has none."""
    from qdm_cli.engine.caching.emit import summary
    from qdm_cli.engine.caching.schedule import SCHEDULE_FILE, read_schedule

    return summary(read_schedule(artifact.folder)) if SCHEDULE_FILE in artifact.manifest.files else None


def bits_summary(layers: list[dict[str, Any]]) -> dict[str, int]:
    """How many layers have which bits: `W4A8` -> 31; `full precision` for skipped ones."""
    return dict(Counter("full precision" if layer.get("skipped_why") else _bits(layer) for layer in layers))


def _bits(layer: dict[str, Any]) -> str:
    return f"W{layer.get('bits_w')}" + (f"A{layer['bits_a']}" if layer.get("bits_a") else "")


def _show(console: Console, artifact: Artifact, data: dict[str, Any], *, layers: bool) -> None:
    from rich.table import Table

    manifest = artifact.manifest
    facts = Table(show_header=False, box=None, pad_edge=False)
    for name, value in _facts(artifact, data):
        facts.add_row(name, value)
    console.print(facts)
    for title, numbers in (("bytes by part", manifest.bytes_by_part), ("metrics", manifest.metrics), ("seconds", manifest.seconds)):
        if numbers:
            table = Table("", title, box=None, pad_edge=False)
            for name, number in numbers.items():
                table.add_row(f"  {name}", _number(number))
            console.print(table)
    if layers:
        table = Table(*_COLUMNS, *_HERE, box=None, pad_edge=False)
        for layer in data["layers"]:
            table.add_row(*(_cell(layer.get(column)) for column in (*_COLUMNS, *_HERE)))
        console.print(table)
    for warning in manifest.warnings:
        console.print(f"warning: {warning}", markup=False)


def _facts(artifact: Artifact, data: dict[str, Any]) -> list[tuple[str, str]]:
    manifest = artifact.manifest
    sampler = " ".join(f"{name}={value}" for name, value in manifest.sampler.items() if value is not None)
    version = f"{manifest.qdm.get('version')} ({(manifest.qdm.get('commit') or 'no commit')[:10]})"
    facts = [
        ("folder", str(artifact.folder)),
        ("kind", manifest.kind + (" (smoke)" if manifest.smoke else "")),
        ("digest", manifest.digest[:16]),
        ("key", manifest.key[:16]),
        ("base model", str(manifest.base_model.get("id"))),
        ("made from", ", ".join(parent.path for parent in manifest.parents) or "the base model"),
        ("sampler", sampler or "none"),
        ("layers", ", ".join(f"{count} {bits}" for bits, count in data["bits"].items()) or "none"),
        ("bytes", f"{data['bytes']:,} in {len(manifest.files)} files"),
        ("kernels", "simulated: no integer kernel runs" if manifest.simulated else "integer"),
        ("verified", manifest.verified),
        ("qdm", version),
    ]
    if data["schedule"]:
        facts.append(("cache", _schedule(data["schedule"])))
    return [*facts, ("gate", manifest.gate)] if manifest.gate else facts


def _schedule(found: dict[str, Any]) -> str:
    speed = "" if found["speedup"] is None else f", denoiser {found['speedup']:.2f}x"
    return f"{found['method']}: {found['full_calls']} of {found['calls']} calls in full, reuses {', '.join(found['cuts'])}{speed}"


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "x".join(str(item) for item in value)
    return "" if value is None else _number(value)
