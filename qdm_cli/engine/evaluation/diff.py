"""`qdm diff`: what two artifacts, runs or metrics.json differ in, and which is better by each metric. Imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qdm_cli.engine.artifact import Artifact
from qdm_cli.engine.caching.emit import summary
from qdm_cli.engine.caching.schedule import SCHEDULE_FILE, read_schedule
from qdm_cli.engine.errors import InputError, Problem
from qdm_cli.engine.evaluation.gates import failures, parse_conditions
from qdm_cli.engine.evaluation.names import METRICS
from qdm_cli.engine.evaluation.protocol import INFORMATIVE, differences
from qdm_cli.engine.evaluation.sides import Side, open_sides

LAYER_FIELDS = ("type", "shape", "bits_w", "bits_a", "granularity", "group", "symmetric", "timestep_rows", "rule", "skipped_why", "bytes")
# Numbers of manifests, which no suite measures.
STAGE_BETTER = {
    "weight_sqnr_db": "higher",
    "mean_bits": "lower",
    "loss_last": "lower",
    "trained_parameters": "lower",
    "personalisation_bytes": "lower",
    "denoiser_bytes": "lower",
    "denoiser_size_ratio": "lower",
    "selfcheck_rel_rms": "lower",
    "selfcheck_max_abs": "lower",
}


@dataclass(frozen=True)
class FieldChange:
    """One field by its dotted name; None = not there."""

    field: str
    a: Any
    b: Any


@dataclass(frozen=True)
class LayerChange:
    """What differs in one layer: field -> [value in A, value in B]; `only_in` a or b: the other has no such layer."""

    name: str
    changes: dict[str, list[Any]]
    only_in: str | None = None


@dataclass(frozen=True)
class MetricRow:
    """One number of both.

    Attributes:
        change: b - a; None = one of them is null.
        better: which way is better; none = a fact.
        winner: a, b, equal; None = not decidable.
    """

    name: str
    unit: str
    better: str
    a: float | None
    b: float | None
    change: float | None
    ratio: float | None
    winner: str | None


@dataclass(frozen=True)
class ImagePair:
    """Image of one seed: equal byte for byte, and PSNR of B against A in dB over 8-bit values (None = equal)."""

    image: str
    equal: bool
    psnr_db: float | None


@dataclass(frozen=True)
class Difference:
    """Everything that `qdm diff` prints."""

    a: str
    b: str
    fields: list[FieldChange]
    layers: list[LayerChange]
    metrics: list[MetricRow]
    images: list[ImagePair]
    notes: list[str] = field(default_factory=list)
    gates: list[str] = field(default_factory=list)

    @property
    def wins(self) -> dict[str, int]:
        """How many metrics A, B or none of them wins."""
        counts = Counter(row.winner for row in self.metrics if row.winner)
        return {side: counts[side] for side in ("a", "b", "equal")}

    @property
    def values(self) -> dict[str, Any]:
        """What `--fail-if` sees: B's numbers, NAME_change = b - a, NAME_ratio = b / a, and three counts of differences."""
        named = {name: value for row in self.metrics for name, value in _names_of(row).items()}
        images = sum(not pair.equal for pair in self.images)
        return {**named, "fields_changed": len(self.fields), "layers_changed": len(self.layers), "images_changed": images}

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "wins": self.wins}


def compare_paths(a: str | Path, b: str | Path, *, suites: Iterable[str] = (), fail_if: Iterable[str] = ()) -> Difference:
    """Compare two artifacts, two run folders or two metrics.json.

    Args:
        suites: compare only these suites' metrics and protocols; empty = all.
        fail_if: conditions METRIC OP NUMBER over `Difference.values`; those that are true come back in `gates`.

    Raises:
        InputError: a path that is none of these, results of unlike protocols (every differing field is listed), a bad condition.
    """
    left, right = open_sides(a, b)
    chosen = frozenset(suites)
    refuse_unlike_sides(left, right, chosen)
    notes = _notes(left, right)
    metrics = metric_rows(left.metrics, right.metrics, chosen, judged=not notes)
    found = Difference(
        a=left.path,
        b=right.path,
        fields=field_changes(left, right),
        layers=layer_changes(left.layers, right.layers),
        metrics=metrics,
        images=image_pairs(left, right),
        notes=notes,
    )
    return Difference(**{**vars(found), "gates": gates_of(found, fail_if, right)})


# ------------------------------------------------------------ comparability


def refuse_unlike_sides(a: Side, b: Side, suites: frozenset[str]) -> None:
    """
    Raises:
        InputError: measured by different protocols, nothing in common, or a model set against an evaluation.
    """
    if (a.evaluation is None) != (b.evaluation is None):
        judged, other = (a, b) if a.evaluation else (b, a)
        raise InputError(f"{judged.name} is an evaluation and {other.name} is not; compare two evaluations or two models")
    if a.evaluation is None or b.evaluation is None:
        return
    here, there = (_limited(side.evaluation.protocol, suites) for side in (a, b) if side.evaluation)
    shared = [part for part in here if part in there and part not in (INFORMATIVE, "common")]
    if not shared:
        raise InputError(f"{a.name} and {b.name} have no suite in common" + (f" among {', '.join(sorted(suites))}" if suites else ""))
    if unlike := differences(here, there):
        error = InputError(
            f"{a.name} and {b.name} were measured by different protocols and are not comparable; --suite limits the comparison"
        )
        error.problems += tuple(Problem(_sides(text), path=text.split(":")[0]) for text in unlike)
        raise error


def _limited(protocol: dict[str, Any], suites: frozenset[str]) -> dict[str, Any]:
    return {part: value for part, value in protocol.items() if not suites or part in suites or part in ("common", INFORMATIVE)}


def _sides(text: str) -> str:
    """`field: 1 here, 2 there` -> `field: 1 in A, 2 in B`."""
    head, _, tail = text.rpartition(" there")
    return f"{' in A,'.join(head.rsplit(' here,', 1))} in B{tail}"


def _notes(a: Side, b: Side) -> list[str]:
    """Why no winner can be named, where that is so."""
    if a.manifest is None or b.manifest is None:
        return []
    bases = [manifest.base_model.get("digest") for manifest in (a.manifest, b.manifest)]
    return ["the base models differ: numbers are shown, none is called better"] if bases[0] != bases[1] else []


# ------------------------------------------------------------ fields, layers, metrics, images


def field_changes(a: Side, b: Side) -> list[FieldChange]:
    """Fields of manifest and recipe that differ, sorted by their dotted names within each part."""
    left, right = _facts(a), _facts(b)
    names = list(left) + [name for name in right if name not in left]
    return [FieldChange(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]


def _facts(side: Side) -> dict[str, Any]:
    if side.artifact is None:
        return _flat(side.evaluation.subject, "subject") if side.evaluation else {}
    manifest = side.artifact.manifest
    chosen = {name: getattr(manifest, name) for name in ("kind", "base_model", "sampler", "seeds", "smoke", "simulated", "verified")}
    chosen |= {"recipe": _recipe(side.artifact), "qdm": manifest.qdm, "environment": manifest.environment}
    if SCHEDULE_FILE in manifest.files:
        chosen["schedule"] = summary(read_schedule(side.artifact.folder))
    chosen |= {"bytes": sum(entry.bytes for entry in manifest.files.values()), "bytes_by_part": manifest.bytes_by_part}
    return {path: leaf for name, value in chosen.items() for path, leaf in _flat(value, name).items()}


def _recipe(artifact: Artifact) -> Any:
    """The resolved recipe, which is written as JSON; None = the artifact has none."""
    path = artifact.folder / "recipe.resolved.yaml"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {path: leaf for key, item in items for path, leaf in _flat(item, f"{prefix}.{key}").items()}
    return {prefix: value}


def layer_changes(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> list[LayerChange]:
    """Layers of the manifests that differ, in A's order, then those that only B has."""
    left, right = ({row["name"]: row for row in rows} for rows in (a, b))
    found = []
    for name, row in left.items():
        if name not in right:
            found.append(LayerChange(name, {}, only_in="a"))
        elif changes := {key: [row.get(key), right[name].get(key)] for key in LAYER_FIELDS if row.get(key) != right[name].get(key)}:
            found.append(LayerChange(name, changes))
    return found + [LayerChange(name, {}, only_in="b") for name in right if name not in left]


def metric_rows(
    a: Mapping[str, Any], b: Mapping[str, Any], suites: frozenset[str] = frozenset(), *, judged: bool = True
) -> list[MetricRow]:
    """Every number that one of them has, in table order; `judged` False = name no winner."""
    names = [name for name in METRICS if name in a or name in b]
    names += [name for name in {**a, **b} if name not in METRICS and not name.endswith("_why")]
    rows = []
    for name in names:
        metric = METRICS.get(name)
        if suites and (metric is None or metric.suite not in suites):
            continue
        values = [value if _is_number(value) else None for value in (a.get(name), b.get(name))]
        if values != [None, None]:
            rows.append(_metric_row(name, *values, judged=judged))
    return rows


def _metric_row(name: str, a: float | None, b: float | None, *, judged: bool) -> MetricRow:
    unit, better = (METRICS[name].unit, METRICS[name].better) if name in METRICS else ("", STAGE_BETTER.get(name, "none"))
    if a is None or b is None:
        return MetricRow(name, unit, better, a, b, None, None, None)
    winner = None
    if judged and better != "none":
        winner = "equal" if a == b else "b" if (b > a) == (better == "higher") else "a"
    return MetricRow(name, unit, better, a, b, b - a, b / a if a else None, winner)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _names_of(row: MetricRow) -> dict[str, float | None]:
    return {row.name: row.b, f"{row.name}_change": row.change, f"{row.name}_ratio": row.ratio}


def image_pairs(a: Side, b: Side) -> list[ImagePair]:
    """Sample images of the two models at equal seeds."""
    left, right = _samples(a), _samples(b)
    return [_image_pair(name, left[name], right[name]) for name in sorted(left.keys() & right.keys())]


def _samples(side: Side) -> dict[str, Path]:
    """Seed index -> PNG of the model under test."""
    if side.evaluation is None or not side.evaluation.grid_rows:
        return {}
    rows, folder = side.evaluation.grid_rows, Path(side.path)
    label = rows[min(1, len(rows) - 1)]
    return {path.name.split("-")[0]: path for path in (folder if folder.is_dir() else folder.parent).glob(f"samples/*-{label}.png")}


def _image_pair(name: str, a: Path, b: Path) -> ImagePair:
    import numpy as np
    from PIL import Image

    left, right = (np.asarray(Image.open(path), dtype=np.float64) for path in (a, b))
    if left.shape != right.shape:
        raise InputError(f"{a} and {b} are images of different sizes")
    error = float(np.mean((left - right) ** 2))
    return ImagePair(name, error == 0, None if error == 0 else 10 * math.log10(255.0**2 / error))


# ------------------------------------------------------------ gate


def gates_of(found: Difference, fail_if: Iterable[str], b: Side) -> list[str]:
    """Reasons of all conditions that are true.

    Raises:
        RecipeError: malformed conditions and names that nothing measures, all at once.
    """
    every = {metric.suite for metric in METRICS.values()}
    known = [f"{name}{suffix}" for name in METRICS for suffix in ("_change", "_ratio")]
    conditions = parse_conditions(fail_if, every, [*known, *found.values], path="--fail-if")
    whys = {key: value for key, value in b.metrics.items() if key.endswith("_why")}
    return failures(conditions, {**whys, **found.values})
