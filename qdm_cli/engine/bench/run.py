"""`qdm bench`: rows of single layers and whole denoisers into one JSON report, written after every row so that nothing measured is lost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qdm_cli.engine.bench.denoisers import measure_denoiser
from qdm_cli.engine.bench.layers import Settings, measure
from qdm_cli.engine.bench.machine import describe, device_name, native_dtype, now, roof_of
from qdm_cli.engine.bench.shapes import MODELS, LayerShape, capped, parse_shapes
from qdm_cli.engine.errors import EnvironmentProblem, InputError

CPU_MACS = 2_000_000_000  # per product: a float64 gate and a dozen rounds of each candidate stay within seconds
Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchPlan:
    """What to measure.

    Attributes:
        shapes: arguments of `parse_shapes`.
        bits: weight bits, one row each.
        denoisers: also whole denoisers of the named models.
        rounds: None = 20 on a CPU, 100 on a GPU; for denoisers 3 and 30.
        profile: also list the operators of each denoiser by their time.
        full: layers at the model's own rows on a CPU too.
    """

    shapes: tuple[str, ...]
    bits: tuple[int, ...] = (8, 4)
    denoisers: bool = False
    layers: bool = True
    compiled: bool = False
    peers: bool = True
    profile: bool = False
    rounds: int | None = None
    full: bool = False
    device: str = "cpu"
    threads: int | None = None


def run_bench(plan: BenchPlan, out: Path | None, say: Say) -> dict[str, Any]:
    """Measure a plan; the report is also written below `out`/<device>/ when `out` is given, as layers.json or denoisers.json.

    Raises:
        InputError: unknown shapes or bits.
        EnvironmentProblem: no such device.
    """
    shapes = tuple(
        capped(shape, None if plan.full or plan.device != "cpu" else CPU_MACS) for text in plan.shapes for shape in parse_shapes(text)
    )
    if bad := [bits for bits in plan.bits if not 2 <= bits <= 8]:
        raise InputError(f"--bits {bad[0]}: weights have 2 to 8 bits")
    if plan.device.startswith("cuda") and not torch.cuda.is_available():
        raise EnvironmentProblem(f"--device {plan.device}: torch sees no CUDA device here")
    if plan.threads:
        torch.set_num_threads(plan.threads)
    roof = roof_of(plan.device)
    report = {**describe(plan.device), "started": now(), "roof": asdict(roof)}
    path = None if out is None else out / device_name(plan.device) / ("layers.json" if plan.layers else "denoisers.json")
    for row in _rows(plan, shapes, roof, say):
        report["rows"].append(row)
        say(line_of(row))
        if path is not None:
            write_report(path, report)
    return report | ({} if path is None else {"path": str(path)})


def _rows(plan: BenchPlan, shapes: tuple[LayerShape, ...], roof: Any, say: Say) -> Iterator[dict[str, Any]]:
    gpu = plan.device.startswith("cuda")
    settings = Settings(plan.device, native_dtype(plan.device), plan.rounds or (100 if gpu else 20), plan.compiled, plan.peers)
    if plan.layers:
        for shape in shapes:
            for bits in plan.bits:
                yield measure(shape, bits, settings, roof)
    if plan.denoisers:
        rounds = plan.rounds or (30 if gpu else 3)
        whole = Settings(plan.device, settings.float_dtype, rounds, plan.compiled, peers=False, profile=plan.profile)
        for name in dict.fromkeys(shape.model for shape in shapes if shape.model in MODELS):
            for bits in plan.bits:
                yield measure_denoiser(name, bits, whole, say=say)


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write a report, replacing the old file at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def line_of(row: dict[str, Any]) -> str:
    """One row as a line for people."""
    what = row.get("layer", "whole denoiser")
    head = f"{row['model']} {what} {row['format']}"
    if "times" not in row:
        return f"{head}: {row['gate']}{': ' + row['why'] if 'why' in row else ''}"
    ratios = ", ".join(f"{name} {ratio:.2f}x" for name, ratio in row["ratios"].items())
    return f"{head}: float {row['times']['float']['best_ms']:.2f} ms; {ratios}" + (f"; {row['chosen']}" if "chosen" in row else "")
