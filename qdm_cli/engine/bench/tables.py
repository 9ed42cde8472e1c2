"""The tables and the plot of kernels/README.md, made of the results under kernels/bench and the shipped tiles, and of nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qdm_cli.engine.bench.machine import SCHEMA

BEGIN, END = "<!-- results: begin; written by `make tables`, not by hand -->", "<!-- results: end -->"
OWN = ("float", "auto", "exact", "integer")  # what `qdm bench` times of a layer itself; the rest are peers
COMMANDS = {"cpu": "make bench", "cuda": "make bench-gpu"}
_BAR, _LEFT, _UNIT, _WIDTH = 14, 330, 150, 900  # pixels of the plot: height of a bar, room for names, width of a ratio of 1

Report = dict[str, Any]


def read_reports(results: Path) -> list[Report]:
    """Every report of this schema below a folder, in the order of their paths."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(results.rglob("*.json"))]
    return [report for report in found if report.get("schema") == SCHEMA and report.get("rows")]


def tables(reports: list[Report]) -> str:
    """Markdown of all reports, CPUs first; a device without a report gets the command that makes one."""
    parts: list[str] = []
    for kind, title in (("cpu", "CPUs"), ("cuda", "GPUs")):
        mine = [report for report in reports if _kind(report) == kind]
        parts.append(f"### {title}")
        parts += [_device(report) for report in mine] or [f"No results yet: `{COMMANDS[kind]}` on such a machine writes them."]
    return "\n\n".join(parts)


def _kind(report: Report) -> str:
    return "cpu" if report.get("cuda") is None else "cuda"


def _device(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    threads = f", {report['threads']} threads" if report.get("threads") else ""
    commit = f"; commit `{report['git_commit'][:9]}`" if report.get("git_commit") else ""
    head = f"**{report['device']}**{threads}, baseline {report['baseline']}, {report['clock']}; {versions}{commit}"
    layers = [row for row in report["rows"] if row["kind"] == "layer"]
    wholes = [row for row in report["rows"] if row["kind"] == "denoiser" and "ratios" in row]
    return "\n\n".join(part for part in (head, _layer_table(layers), _denoiser_table(wholes)) if part)


def _layer_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    head = ("model", "layer", "M x N x K", "format", "float ms", "auto", "exact", "from codes", "of roofline", "kernel", "peers")
    return _markdown(head, [_layer_cells(row) for row in rows])


def _layer_cells(row: dict[str, Any]) -> list[str]:
    sizes = f"{row['rows']} x {row['outputs']} x {row['terms']}" + (f" (of {row['capped_from']})" if "capped_from" in row else "")
    cells = [row["model"], row["layer"], sizes, row["format"]]
    if "times" not in row:
        return [*cells, f"not timed: {row['gate']}", *[""] * 6]
    ratios, share = row["ratios"], row.get("roofline_share", {}).get("integer")
    peers = "; ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items() if name not in OWN)
    own = [f"{ratios[name]:.2f}x" for name in OWN[1:]]
    return [*cells, f"{_best(row['times']['float']):.2f}", *own, "" if share is None else f"{share:.0%}", row["chosen"], peers]


def _denoiser_table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    cells = [[row["model"], str(row["batch"]), row["format"], _baseline(row), _gains(row)] for row in rows]
    return _markdown(("denoiser", "batch", "format", "float ms", "against it"), cells)


def _baseline(row: dict[str, Any]) -> str:
    if "times" in row:
        return f"{_best(row['times']['float']):.1f}"
    return ", ".join(f"{way} {one['median_ms']:.1f}" for way, one in row["bf16"].items() if "median_ms" in one)


def _gains(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())


def _best(times: dict[str, float]) -> float:
    return times["best_ms"]


def _markdown(head: tuple[str, ...], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [list(head), ["---"] * len(head), *rows])


def plot(reports: list[Report]) -> str:
    """SVG: one bar per row, the ratio of mode `auto` to the float baseline, and a line at 1. Plain text, so that a test can compare it."""
    bars: list[tuple[str, float | None]] = []
    for report in reports:
        rows = [row for row in report["rows"] if "ratios" in row and "auto" in row["ratios"]]
        if rows:
            bars.append((f"{report['device']} against {report['baseline']}", None))
            bars += [(f"{row['model']} {row.get('layer', 'whole denoiser')} {row['format']}", row["ratios"]["auto"]) for row in rows]
    height = _BAR * (len(bars) + 2)
    lines = [f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="sans-serif" font-size="11">']
    lines += [_bar(index, *bar) for index, bar in enumerate(bars)]
    lines.append(f'<line x1="{_LEFT + _UNIT}" y1="0" x2="{_LEFT + _UNIT}" y2="{height}" stroke="#999" stroke-dasharray="3"/>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _bar(index: int, name: str, ratio: float | None) -> str:
    y, safe = _BAR * (index + 1), name.replace("&", "&amp;").replace("<", "&lt;")
    if ratio is None:
        return f'<text x="4" y="{y}" font-weight="bold">{safe}</text>'
    width = min(round(_UNIT * ratio), _WIDTH - _LEFT - 50)
    bar = f'<rect x="{_LEFT}" y="{y - 10}" width="{width}" height="{_BAR - 3}" fill="{"#27a" if ratio >= 1 else "#b54"}"/>'
    return f'<text x="{_LEFT - 6}" y="{y}" text-anchor="end">{safe}</text>{bar}<text x="{_LEFT + width + 4}" y="{y}">{ratio:.2f}x</text>'


def tuned_table(path: Path) -> str:
    """Markdown of a file of measured tiles: one kernel's time on its operands, codes in and bf16 out, against bf16 of cuBLAS or cuDNN."""
    content = json.loads(path.read_text(encoding="utf-8"))
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    rows = [
        [e["op"], f"{e.get('rows', e['m'])} x {e['n']} x {e['k']}", f"{e['bf16_us']:.1f}", f"{e['us']:.1f}", f"{e['ratio']:.2f}x", _tile(e)]
        for e in content["entries"]
    ]
    head = ("kernel", "M (or the power of two above) x N x K", "bf16 us", "qdm us", "ratio", "tile, warps, stages, splits of K")
    text = f"**{content['device']}**, kernels alone, `{path.name}` of `qdm bench --tune`, each right by its gate first; {versions}"
    return f"{text}\n\n{_markdown(head, rows)}"


def _tile(entry: dict[str, Any]) -> str:
    tile = entry["tile"]
    size = f"{tile['bm']}x{tile['bn']}x{tile['bk']}, {tile['warps']}, {tile['stages']}, {entry['splits']}"
    return f"{size}{', copy engine' if tile.get('tma') else ''}"


def filled(readme: str, reports: list[Report], tuned: tuple[Path, ...] = ()) -> str:
    """A README with the part between the two marks made anew; tuned: files of measured tiles.

    Raises:
        ValueError: it does not have both marks.
    """
    before, found, rest = readme.partition(BEGIN)
    _, also, after = rest.partition(END)
    if not (found and also):
        raise ValueError(f"the README has no pair of marks {BEGIN} and {END}")
    text = "\n\n".join([tables(reports), *map(tuned_table, tuned)])
    return f"{before}{BEGIN}\n{text}\n\n![ratios](bench/results/ratios.svg)\n\n{END}{after}"


def update(kernels: Path, *, check: bool = False) -> list[Path]:
    """Write the README and the plot of a kernels folder; returns those that were out of step. check: write nothing."""
    reports = read_reports(kernels / "bench/results")
    readme, picture = kernels / "README.md", kernels / "bench/results/ratios.svg"
    tuned = (*sorted((kernels / "qdm_kernels/tuned").glob("*.json")), *sorted((kernels / "bench/results").rglob("tuned.json")))
    wanted = {readme: filled(readme.read_text(encoding="utf-8"), reports, tuned), picture: plot(reports)}
    stale = [path for path, text in wanted.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path in [] if check else stale:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(wanted[path], encoding="utf-8")
    return stale
