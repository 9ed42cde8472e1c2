"""The plan of a recipe. Reads configurations, never weights (except `measure`), and writes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import nn

from qdm_cli.engine.diffusion.prompts import prompts_for
from qdm_cli.engine.errors import EnvironmentProblem, InputError, OutOfMemory, QdmError
from qdm_cli.engine.evaluation.auto_bits import table_rows
from qdm_cli.engine.models import meta_denoiser
from qdm_cli.engine.models.folder import read_index
from qdm_cli.engine.models.source import resolve_source
from qdm_cli.engine.plan.auto import with_auto
from qdm_cli.engine.plan.cache import cache_macs
from qdm_cli.engine.plan.calls import Calls, denoiser_calls, train_steps
from qdm_cli.engine.plan.inputs import CallShape, call_shape
from qdm_cli.engine.plan.memory import Estimate, adapt_estimate, calibrate_estimate, finetune_estimate
from qdm_cli.engine.plan.missing import Missing, missing_weights
from qdm_cli.engine.plan.table import stored_table
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.scale_config import AdaptConfig
from qdm_cli.engine.quant.units import find_units
from qdm_cli.engine.recipe.checks import stages_of
from qdm_cli.engine.run.smoke import smoke_recipe
from qdm_cli.engine.runtime.size import bytes_by_part, nbytes, owner_of, tensor_table

if TYPE_CHECKING:
    from qdm_cli.engine.quant.state import LayerDecision
    from qdm_cli.engine.recipe.schema import Recipe


UNQUANTIZED = (
    "no stage of this recipe quantizes: bits and bytes hold for an artifact given with --from; the plain model is exported as it is, with "
    "the cache schedule beside it"
)


@dataclass(frozen=True)
class Plan:
    """What would happen.

    Attributes:
        model: id, pipeline class, component, parameters.
        stages: stages of the recipe, in order.
        target: export target and why.
        layers: one dict per Linear and Conv2d: name, type, shape, role, bits, granularity, rule, skipped_why, bytes in the export.
        bytes: of the exported denoiser by part. `fp16_bytes`: of the same denoiser in fp16.
        rows: rows of the step tables.
        calls: denoiser calls by phase; `seconds` of a call only where it was measured.
        memory: peak bytes of calibrate and finetune on the CPU, by part.
        missing: weights to download.
        cache: multiply-adds of cached sampling, `cache_macs`; None = the recipe has no cache.
        failures: what would stop it, with the exit code.
        notes: what the plan cannot know yet, and what it took for granted.
    """

    model: dict[str, Any]
    stages: list[str]
    target: str
    layers: list[dict[str, Any]]
    bytes: dict[str, int]
    fp16_bytes: int
    rows: int
    calls: list[dict[str, Any]]
    memory: dict[str, dict[str, int]]
    missing: list[Missing]
    cache: dict[str, Any] | None = None
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def exit_code(self) -> int:
        """0, or that of the first failure."""
        return int(self.failures[0]["exit_code"]) if self.failures else 0

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with sums."""
        ratio = self.total_bytes / self.fp16_bytes if self.fp16_bytes else None
        return {**asdict(self), "total_bytes": self.total_bytes, "ratio_to_fp16": ratio, "exit_code": self.exit_code}


def make_plan(recipe: Recipe, *, measure: bool = False, offline: bool = False, smoke: bool = False) -> Plan:
    """Plan a recipe.

    Args:
        measure: load the model and time three calls of each kind; else no time is given.
        smoke: plan the smoke run.

    Raises:
        InputError: a rule matches nothing, a layer has no integer form, or there is no such model.
        EnvironmentProblem: the model's configuration cannot be read offline.
    """
    recipe = smoke_recipe(recipe) if smoke else recipe
    component, denoiser, pipeline_class = meta_denoiser(recipe.model, smoke=smoke, offline=offline)
    decisions = resolve(denoiser, recipe.quantize)
    rows = _rows(recipe, decisions)
    decisions, notes = with_auto(recipe, component, denoiser, decisions, rows, smoke=smoke)
    missing = missing_weights(recipe, smoke=smoke, offline=offline)
    units = len(find_units(denoiser, [d.name for d in decisions if d.skipped_why is None]))
    phases = denoiser_calls(recipe, len(decisions), units)
    shapes = {(c.stage, c.phase): call_shape(recipe, denoiser, pipeline_class, c.images, guided=c.guided, smoke=smoke) for c in phases}
    memory = _memory(recipe, denoiser, decisions, shapes, _other_bytes(recipe, component, smoke=smoke))
    if recipe.cache is not None and recipe.calibrate is None and recipe.finetune is None:
        notes = [*notes, UNQUANTIZED]
    target = recipe.export.target if recipe.export else "none"
    table = stored_table(recipe, component, denoiser, decisions, rows, smoke=smoke)
    seconds = _measured(recipe, phases, shapes, smoke=smoke, offline=offline) if measure else {}
    return Plan(
        model={
            "id": recipe.model.id,
            "pipeline": pipeline_class,
            "component": component,
            "class": type(denoiser).__name__,
            "parameters": sum(p.numel() for p in denoiser.parameters()),
        },
        stages=stages_of(recipe),
        target=_target_words(target),
        layers=_layer_rows(decisions, table),
        bytes=bytes_by_part(table, decisions),
        fp16_bytes=sum(bytes_by_part(tensor_table([], denoiser, rows, "F16"), []).values()),
        rows=rows,
        calls=[_call_row(c, shapes[c.stage, c.phase], seconds.get((c.stage, c.phase))) for c in phases],
        memory={stage: estimate.to_dict() for stage, estimate in memory.items()},
        missing=missing,
        cache=cache_macs(recipe, denoiser, pipeline_class, smoke=smoke),
        failures=[_failure(error) for error in _failures(recipe, missing, memory, offline=offline)],
        notes=notes,
    )


def rule_hits(recipe: Recipe, *, offline: bool = False, smoke: bool = False) -> dict[str, int]:
    """How many layers each rule decides.

    Raises:
        InputError: a rule matches nothing, or nothing is left to quantize.
    """
    denoiser = meta_denoiser(recipe.model, smoke=smoke, offline=offline)[1]
    return dict(Counter(decision.rule for decision in resolve(denoiser, recipe.quantize)))


def _rows(recipe: Recipe, decisions: list[LayerDecision]) -> int:
    """Rows of the step tables."""
    if not any(d.timestep_aware and not d.skipped_why for d in decisions):
        return 1
    return table_rows(recipe)


def _target_words(target: str) -> str:
    return "qdm (auto: the only one that keeps integer codes and step tables)" if target == "auto" else target


def _layer_rows(decisions: list[LayerDecision], table: dict[str, Any]) -> list[dict[str, Any]]:
    own: Counter[str] = Counter()
    quantized = {d.name for d in decisions}
    for name, entry in table.items():
        own[owner_of(name, quantized)[0]] += nbytes(entry)
    return [{**asdict(d), "shape": list(d.shape), "bytes": own[d.name]} for d in decisions]


def _call_row(calls: Calls, shape: CallShape, seconds: float | None) -> dict[str, Any]:
    total = None if seconds is None else seconds * calls.count
    return {**asdict(calls), "batch": shape.samples, "seconds_per_call": seconds, "seconds": total}


def _other_bytes(recipe: Recipe, component: str, *, smoke: bool) -> int:
    """Weights of the pipeline's other components as files; 0 where they are not on this machine."""
    source = resolve_source(recipe.model, smoke=smoke, offline=True)
    if source.path is None or not source.path.is_dir():
        return 0
    index = read_index(source.path)
    parts = [index.part(name) for name in index.parts if name != component and name not in index.optional]
    files = {file for part in parts if part != source.path for file in part.glob("*.safetensors")}
    return sum(file.stat().st_size for file in files)


def _memory(
    recipe: Recipe, denoiser: nn.Module, decisions: list[LayerDecision], shapes: dict[tuple[str, str], CallShape], others: int
) -> dict[str, Estimate]:
    found = {}
    if recipe.calibrate is not None:
        own = {phase: shape for (stage, phase), shape in shapes.items() if stage == "calibrate"}
        own.setdefault("ranges", own["trajectories"])
        found["calibrate"] = calibrate_estimate(recipe, denoiser, decisions, own, recipe.sampler.steps, others)
    if recipe.finetune is not None:
        shape, steps = shapes["finetune", "training"], train_steps(recipe) or recipe.sampler.steps
        if isinstance(recipe.finetune, AdaptConfig):
            found["finetune"] = adapt_estimate(recipe, denoiser, decisions, shape, others)
        else:
            found["finetune"] = finetune_estimate(recipe, denoiser, decisions, shape, steps, others)
    return found


def _measured(
    recipe: Recipe, phases: list[Calls], shapes: dict[tuple[str, str], CallShape], *, smoke: bool, offline: bool
) -> dict[tuple[str, str], float]:
    from qdm_cli.engine.plan.measure import seconds_per_call

    return seconds_per_call(recipe, phases, shapes, smoke=smoke, offline=offline)


def _failures(recipe: Recipe, missing: list[Missing], memory: dict[str, Estimate], *, offline: bool) -> Iterator[QdmError]:
    """Conditions that would stop the run, in the order in which it would meet them."""
    if recipe.calibrate is not None:
        try:
            prompts_for(recipe.calibrate.data.prompts, 1)
        except QdmError as error:
            yield error
    against = recipe.evaluate.against if recipe.evaluate else "base"
    if against != "base" and not Path(against).expanduser().exists():
        yield InputError(f"evaluate.against: there is no {against}")
    if recipe.device.name.startswith("cuda") and not torch.cuda.is_available():
        yield EnvironmentProblem(f"device.name: there is no {recipe.device.name} here")
    if "tensorboard" in getattr(recipe.finetune, "log", ()) and find_spec("tensorboard") is None:
        yield EnvironmentProblem('finetune.log: tensorboard is not installed. Run `pip install "qdm[train]"`.')
    needed = [item for item in missing if item.needed]
    if needed and offline:
        yield EnvironmentProblem(f"offline, and {needed[0].file} of {needed[0].id} is not in the local cache")
    if recipe.device.name in ("auto", "cpu") and not (recipe.device.name == "auto" and torch.cuda.is_available()):
        yield from _too_large(recipe, memory)


def _too_large(recipe: Recipe, memory: dict[str, Estimate]) -> Iterator[OutOfMemory]:
    limits = {"this machine's memory": psutil.virtual_memory().total}
    if recipe.device.max_cpu is not None:
        limits["device.max_cpu"] = recipe.device.max_cpu
    what, limit = min(limits.items(), key=lambda item: item[1])
    change = {"calibrate": "calibrate.data.batch", "finetune": "finetune.batch_size"}
    for stage, estimate in memory.items():
        if estimate.peak > limit:
            size = f"about {estimate.peak / 2**30:.1f} GiB, more than {what} ({limit / 2**30:.1f} GiB)"
            yield OutOfMemory(f"{stage} needs {size}. Lower {change[stage]}.")


def _failure(error: QdmError) -> dict[str, Any]:
    return {"exit_code": error.exit_code, "message": str(error)}
