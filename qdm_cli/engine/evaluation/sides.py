"""The two sides of a comparison: artifacts, runs or metrics.json, found and opened. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdm_cli.engine.artifact import MANIFEST, Artifact, Manifest, open_artifact
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.result import METRICS_FILE, Evaluation, read_evaluation

STAGES = ("evaluate", "export", "cache", "finetune", "calibrate")
"""Furthest first: two runs are compared by the furthest stage that both have."""


@dataclass(frozen=True)
class Side:
    """One of the two: a published artifact, a metrics.json, or both.

    Attributes:
        name: what the user called it.
        path: the folder or file that is read.
    """

    name: str
    path: str
    artifact: Artifact | None
    evaluation: Evaluation | None

    @property
    def manifest(self) -> Manifest | None:
        return None if self.artifact is None else self.artifact.manifest

    @property
    def metrics(self) -> Mapping[str, Any]:
        if self.evaluation is not None:
            return self.evaluation.metrics
        return {} if self.manifest is None else self.manifest.metrics

    @property
    def layers(self) -> list[dict[str, Any]]:
        return self.evaluation.layers if self.evaluation is not None else [] if self.manifest is None else self.manifest.layers


def open_sides(a: str | Path, b: str | Path) -> tuple[Side, Side]:
    """Both sides; of a run folder the stage that fits the other side is taken.

    Raises:
        InputError: a path that does not exist or holds no result, or no stage in common.
    """
    for path in (a, b):
        if not Path(path).expanduser().exists():
            raise InputError(f"{path}: no such file or folder")
    stages_a, stages_b = run_stages(a), run_stages(b)
    wanted = [stage for stage in STAGES if stage in (stages_a or STAGES) and stage in (stages_b or STAGES)]
    if stages_a and stages_b and not wanted:
        raise InputError(f"{a} has finished {', '.join(stages_a)}, {b} has finished {', '.join(stages_b)}: no stage in common")
    left = _open(a, stages_a, wanted[:1] if stages_b else [_stage_of(b)])
    right = _open(b, stages_b, wanted[:1] if stages_a else [_stage_of(a)])
    return left, right


def run_stages(path: str | Path) -> dict[str, Path] | None:
    """Finished stages of a run folder, furthest first: by `latest-<stage>`, else the newest; None = no run folder."""
    folder = Path(path).expanduser()
    if not folder.is_dir() or (folder / MANIFEST).is_file() or (folder / METRICS_FILE).is_file():
        return None
    found = {}
    for stage in STAGES:
        linked = folder / f"latest-{stage}"
        candidates = [linked] if (linked / MANIFEST).is_file() else [path.parent for path in folder.glob(f"{stage}-????????/{MANIFEST}")]
        if candidates:
            found[stage] = max(candidates, key=lambda path: (path / MANIFEST).stat().st_mtime)
    return found or None


def _stage_of(path: str | Path) -> str:
    """Stage that a path which is no run folder belongs to."""
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        return open_artifact(folder).manifest.stage
    return "evaluate"


def _open(path: str | Path, stages: dict[str, Path] | None, wanted: list[str]) -> Side:
    if stages is None:
        return open_side(str(path), Path(path).expanduser())
    stage = wanted[0]
    if stage not in stages:
        raise InputError(f"{path} has no finished {stage} (only {', '.join(stages)}), which is what the other side is")
    return open_side(str(path), stages[stage])


def open_side(name: str, path: Path) -> Side:
    """An artifact folder, its metrics.json, or a metrics.json alone.

    Raises:
        InputError: none of these.
    """
    folder = path if path.is_dir() else path.parent
    artifact = open_artifact(folder) if (folder / MANIFEST).is_file() else None
    has_metrics = path.is_file() or (folder / METRICS_FILE).is_file()
    if artifact is None and not has_metrics:
        raise InputError(f"{name} is neither an artifact, nor a run folder with a finished stage, nor a metrics.json")
    evaluation = None
    if has_metrics:
        evaluation = read_evaluation(path if path.is_file() and path.name != MANIFEST else folder / METRICS_FILE)
    return Side(name, str(folder if artifact else path), artifact, evaluation)
