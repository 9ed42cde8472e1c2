"""`evaluate`: judge a model by images and numbers, and write the report."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.artifact import write_json, write_text
from qdm_cli.engine.context import StageResult
from qdm_cli.engine.diffusion.images import DIGITS
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation import charts, report
from qdm_cli.engine.evaluation.config import EvaluateSpec
from qdm_cli.engine.evaluation.gates import failures, parse_conditions
from qdm_cli.engine.evaluation.names import of_suites
from qdm_cli.engine.evaluation.protocol import refuse_unlike
from qdm_cli.engine.evaluation.result import METRICS_FILE, Evaluation, compare, read_evaluation
from qdm_cli.engine.evaluation.session import Session
from qdm_cli.engine.evaluation.subject import load_base, load_reference_model, load_subject

if TYPE_CHECKING:
    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.context import RunContext


def evaluate(spec: EvaluateSpec, source: Artifact | None, ctx: RunContext) -> StageResult:
    """Compare the model of `source` with the base model at equal seeds; None = evaluate the base model itself.

    Raises:
        InputError: a bad `fail_if`, an unlike protocol in `against`, or an artifact without a model; nothing was run.
        GateFailed: an image holds NaN or infinity.
    """
    check_suites(spec)
    check_files(spec)
    other_file, model_folder = resolve_against(spec.against)
    other = None if other_file is None else read_evaluation(other_file)
    names = of_suites({suite.method for suite in spec.suites})
    conditions = parse_conditions(spec.fail_if, {suite.method for suite in spec.suites}, change_names(names) if other else ())

    base = load_base(ctx)
    subject = base if source is None else load_subject(source, base, ctx)
    reference = load_reference_model(model_folder, base, ctx) if model_folder else (None if source is None else base)
    session = Session(spec, ctx, subject, reference, base)
    if other is not None:
        refuse_unlike(_known(session.protocol), _known(other.protocol), str(other_file))
    session.run()
    if other is not None:
        refuse_unlike(session.protocol, other.protocol, str(other_file))

    comparison = compare(session.metrics, other.metrics) if other else {}
    changes = {f"{name}_change": row["change"] for name, row in comparison.items()}
    gate = "; ".join(failures(conditions, {**session.metrics, **changes})) or None
    result = summarize(session, gate=gate, against=str(other_file) if other_file else None, comparison=comparison)
    write_files(result, session, ctx.payload)
    return StageResult(
        layers=session.layers,
        sampler=ctx.recipe.sampler.model_dump(mode="json"),
        metrics=session.metrics,
        base_model=base.loaded.identity,
        seeds={"first": ctx.recipe.seed, "images": max(session.counts.values(), default=0)},
        seconds=session.seconds,
        simulated=result.simulated,
        gate=gate,
        primary=METRICS_FILE,
    )


def check_suites(spec: EvaluateSpec) -> None:
    """
    Raises:
        InputError: no suite, or one twice.
    """
    methods = [suite.method for suite in spec.suites]
    if not methods:
        raise InputError("names no suite; choose from fidelity, distribution, cost", path="evaluate.suites")
    if repeated := sorted({name for name in methods if methods.count(name) > 1}):
        raise InputError(f"{', '.join(repeated)} is named more than once", path="evaluate.suites")


def check_files(spec: EvaluateSpec) -> None:
    """
    Raises:
        InputError: a weight file or reference that does not exist; found before hours of sampling.
    """
    named = {"evaluate.weights.inception": spec.weights.inception}
    named |= {f"evaluate.suites.{i}.reference": getattr(suite, "reference", None) for i, suite in enumerate(spec.suites)}
    for path, value in named.items():
        if value not in (None, "auto", DIGITS) and not Path(value).expanduser().exists():
            raise InputError(f"{value}: no such file or folder", path=path)


def resolve_against(against: str) -> tuple[Path | None, Path | None]:
    """(metrics.json of another run, folder of another model); both None for `base`.

    Raises:
        InputError: the path is neither.
    """
    if against == "base":
        return None, None
    path = Path(against).expanduser().absolute()
    if path.is_file():
        return path, None
    if (path / METRICS_FILE).is_file():
        return path / METRICS_FILE, None
    if path.is_dir():
        return None, path
    raise InputError(f"{path}: no such file or folder; write base, a metrics.json, or the folder of a model", path="evaluate.against")


def change_names(names: Iterable[str]) -> list[str]:
    """Names under which `fail_if` sees the difference to another run."""
    return [f"{name}_change" for name in names]


def _known(protocol: dict[str, Any]) -> dict[str, Any]:
    """What is certain before an image is made: all but the images' size and the features they are measured with."""
    known: dict[str, Any] = {"common": {}} | {part: dict(fields) for part, fields in protocol.items()}
    known["common"].pop("size", None)
    known.get("distribution", {}).pop("extractors", None)
    return known


def summarize(session: Session, *, gate: str | None, against: str | None, comparison: dict[str, dict[str, float]]) -> Evaluation:
    """Content of metrics.json."""
    subject, reference = session.subject, session.reference
    traced = 0 if session.trace is None else session.protocol["fidelity"]["trajectories"]
    return Evaluation(
        subject={"name": subject.name, "kind": subject.kind, "digest": subject.digest},
        reference=None if reference is None else {"name": reference.name, "kind": reference.kind, "digest": reference.digest},
        simulated=subject.kind == "simulated" or subject.note is not None,
        note=subject.note,
        metrics=session.metrics,
        timesteps=session.trace.rows() if session.trace else [],
        layers=session.layers,
        against=against,
        comparison=comparison,
        protocol=session.protocol,
        gate=gate,
        warnings=list(session.ctx.warnings),
        grid_rows=grid_labels(session),
        trace_note=f"Pooled over {traced} trajectories at equal seeds." if traced else "",
        seconds=session.seconds,
    )


def grid_labels(session: Session) -> list[str]:
    """Rows of the grid, top to bottom; empty without images."""
    if not session.counts:
        return []
    if session.reference is None:
        return ["base"]
    return ["base" if session.reference.kind == "base" else "reference", session.subject.kind, f"difference x{charts.DIFFERENCE_GAIN:g}"]


def write_files(result: Evaluation, session: Session, folder: Path) -> None:
    """metrics.json, the pictures, single samples and both reports."""
    pictures = draw(result, session, folder / "samples")
    for name, data in pictures.items():
        (folder / f"{name}.png").write_bytes(data)
    write_text(folder / "report.html", report.render_html(result, pictures))
    write_text(folder / "report.md", report.render_markdown(result, pictures))
    write_json(folder / METRICS_FILE, result.model_dump(mode="json", by_alias=True))


def draw(result: Evaluation, session: Session, samples: Path) -> dict[str, bytes]:
    """PNG files by name; the first images are also written one by one."""
    pictures: dict[str, bytes] = {}
    if result.grid_rows:
        count = min(session.spec.grid, *session.counts.values())
        own = session.own_bank.read(0, count)
        other = None if session.reference_bank is None else session.reference_bank.read(0, count)
        rows = {result.grid_rows[0]: own if other is None else other}
        if other is not None:
            rows[result.grid_rows[1]] = own
        drawn = {label: [charts.to_picture(image) for image in images] for label, images in rows.items()}
        samples.mkdir(exist_ok=True)
        for label, row in drawn.items():
            for index, picture in enumerate(row):
                (samples / f"{index:05d}-{label}.png").write_bytes(charts.png_bytes(picture))
        if other is not None:
            drawn[result.grid_rows[2]] = [charts.difference_map(a, b) for a, b in zip(own, other, strict=True)]
        pictures["grid"] = charts.png_bytes(charts.image_grid(drawn))
    if result.timesteps:
        pictures["timesteps"] = charts.timestep_chart(result.timesteps)
    if session.trace is not None and session.trace.layers:
        pictures["layers"] = charts.layer_chart(result.layers)
    return pictures
