"""report.html (one file, nothing loaded from elsewhere) and report.md (a CI comment) from the content of metrics.json."""

from __future__ import annotations

import base64
import json
from functools import cache
from pathlib import Path
from typing import Any

from qdm_cli.engine.evaluation.names import METRICS
from qdm_cli.engine.evaluation.result import Evaluation

TEMPLATES = Path(__file__).parent / "templates"
_BAR_REM = 20.0


@cache
def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    # names of layers and prompts come from models: everything is escaped in HTML
    escaped = ("html",)
    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(escaped),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
    )


def template(name: str) -> Any:
    """A page of this package by file name; in .html everything that is filled in is escaped."""
    return _environment().get_template(name)


def number(value: Any, unit: str = "") -> str:
    """Four significant digits with the unit; a dash for null."""
    if value is None:
        return "–"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        return f"{text} {unit}".strip()
    return str(value)


def render_html(result: Evaluation, pictures: dict[str, bytes]) -> str:
    """The page; `pictures` are PNG files by name (`grid`, `timesteps`, `layers`), put into it as data."""
    inline = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in pictures.items()}
    absent = dict.fromkeys(("grid", "timesteps", "layers"))
    return template("report.html").render(**_content(result), pictures={**absent, **inline})


def render_markdown(result: Evaluation, pictures: dict[str, bytes]) -> str:
    """The comment; pictures are named by file, beside it."""
    files = [(name, f"{name}.png") for name in pictures]
    return template("report.md").render(**_content(result), files=files)


def _content(result: Evaluation) -> dict[str, Any]:
    metrics = result.metrics
    present = [name for name in METRICS if metrics.get(name) is not None]
    return {
        "title": f"{result.subject['name']} against {result.reference['name']}" if result.reference else result.subject["name"],
        "subtitle": _subtitle(result),
        "gate": result.gate,
        "notes": [*([result.note] if result.note else []), *result.warnings],
        "headline": [_row(name, metrics) for name in present if METRICS[name].headline],
        "metrics": [_row(name, metrics) for name in present],
        "missing": _missing(metrics),
        "distances": _distance_bars(metrics, result.protocol),
        "against": result.against or "",
        "comparison": [
            {"name": name, "this": number(row["this"]), "other": number(row["other"]), "change": f"{row['change']:+.4g}"}
            for name, row in result.comparison.items()
        ],
        "grid_rows": ", ".join(result.grid_rows),
        "trace_note": result.trace_note,
        "layers": [_layer(row) for row in result.layers],
        "protocol": sorted(flatten(result.protocol).items()),
    }


def _subtitle(result: Evaluation) -> str:
    common = result.protocol["common"]
    sampler = common["sampler"]
    size = "x".join(str(side) for side in common["size"]) if common["size"] else "?"
    steps = f"{sampler['scheduler'] or 'own scheduler'}, {sampler['steps']} steps"
    return f"{result.subject['kind']} model, {steps}, images {size}, seeds from {common['seed']}"


def _row(name: str, metrics: dict[str, Any]) -> dict[str, str]:
    metric = METRICS[name]
    better = f" ({metric.better} is better)" if metric.better != "none" else ""
    return {"name": name, "value": number(metrics[name], metric.unit), "meaning": metric.meaning + better}


def _missing(metrics: dict[str, Any]) -> list[dict[str, str]]:
    """Null metrics, grouped by their reason."""
    groups: dict[str, list[str]] = {}
    for name, value in metrics.items():
        if value is None:
            groups.setdefault(str(metrics.get(f"{name}_why")), []).append(name)
    return [{"names": ", ".join(names), "why": why} for why, names in groups.items()]


def _distance_bars(metrics: dict[str, Any], protocol: dict[str, Any]) -> list[dict[str, Any]]:
    charts = []
    for fid, label in (("fid[fashion]", "[fashion]"), ("fid", "inception")):
        if metrics.get(fid) is None:
            continue
        shown = (
            ("floor: real against real", f"{fid}_floor", "floor"),
            ("floor at this number of images", f"{fid}_floor_at_n", "floor"),
            ("base model", f"{fid}_base", ""),
            ("this model", fid, "own"),
        )
        bars = [(name, float(metrics[key]), kind) for name, key, kind in shown if metrics.get(key) is not None]
        largest = max([value for _, value, _ in bars] + [1e-12])
        rows = [
            {"label": name, "value": number(value), "kind": kind, "width": f"{_BAR_REM * value / largest:.2f}"}
            for name, value, kind in bars
        ]
        n = protocol["distribution"]["n"]
        note = f"{n} images. The distance is biased upwards when images are few; compare only equal numbers of images."
        charts.append({"title": f"Frechet distance, {label} features", "bars": rows, "note": note})
    return charts


def _layer(row: dict[str, Any]) -> dict[str, str]:
    skipped = row.get("skipped_why")
    return {
        "name": row["name"],
        "role": str(row.get("role", "")),
        "bits_w": "float" if skipped else f"{row['bits_w']} bit",
        "bits_a": "float" if skipped or row.get("bits_a") is None else f"{row['bits_a']} bit",
        "sqnr": number(row.get("weight_sqnr_db")),
        "error": number(row.get("output_error")),
        "rule": skipped or str(row.get("rule", "")),
    }


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested protocol -> dotted name and text."""
    if isinstance(value, dict):
        return {
            name: text for key, item in value.items() for name, text in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value)}
