"""`export`: integer codes and scales -> a diffusers folder that a fresh process opens and computes the same with."""

from __future__ import annotations

import inspect
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qdm_cli.engine.caching.schedule import SCHEDULE_FILE, Schedule, read_schedule
from qdm_cli.engine.context import StageResult
from qdm_cli.engine.diffusion.sampling import step_timesteps
from qdm_cli.engine.diffusion.trajectories import timestep_of
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.models.load import quiet
from qdm_cli.engine.models.source import resolve_source
from qdm_cli.engine.quant.attention import CHILD
from qdm_cli.engine.quant.report import layer_rows
from qdm_cli.engine.quant.scale_rows import TABLES
from qdm_cli.engine.quant.state import STATE_FILE, LayerDecision, QuantState, read_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime import folder as writer
from qdm_cli.engine.runtime.card import model_card
from qdm_cli.engine.runtime.selfcheck import Arguments, Export, check_export, run_probe
from qdm_cli.engine.runtime.size import Table, bytes_by_part, nbytes, owner_of, tensor_table

if TYPE_CHECKING:
    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.recipe.schema import ExportSpec

LARGE = 500_000_000
"""Parameters from which the self-check runs in the model's own type instead of float32 (interface spec 8.8)."""


@dataclass(frozen=True)
class Written:
    """A denoiser on disk. `expected`: what each tensor must be after loading; `table`: what the files hold."""

    folder: Path
    expected: dict[str, torch.Tensor]
    table: Table


def export(spec: ExportSpec, source: Artifact | None, ctx: RunContext) -> StageResult:
    """Write the compressed pipeline, reload it in a fresh process, compare.

    Raises:
        InputError: no source, a corrupt one, one of another model, or a layer without an integer form.
        GateFailed: the self-check failed; nothing is published.
    """
    if source is None:
        raise InputError("export needs a calibrated, fine-tuned or cached artifact: give --from DIR")
    state, started = _state(source), time.monotonic()
    loaded = _load(ctx)
    target = _target(spec, state, ctx)
    if state.attention:
        ctx.warn(_attention_warning(len(state.attention), target))
    decisions = [layer.decision for layer in state.layers.values()] + list(state.skipped)
    reference = _fp16_bytes(loaded, len(state.step_keys))
    calls = probe_calls(loaded, ctx) if spec.verify else []

    written = _write_denoiser(target, loaded, state, ctx.payload if spec.component_only else ctx.payload / loaded.component)
    if not spec.component_only:
        with quiet():
            writer.write_pipeline(ctx.payload, loaded.pipeline, loaded.component, _source_folder(ctx))
    schedule = _copy_schedule(source, ctx)
    parts = _parts(ctx.payload, written, decisions if target == "qdm" else [])
    sampler = ctx.recipe.sampler.model_dump(mode="json")
    lone_class = type(loaded.denoiser).__name__ if spec.component_only else None
    facts: dict[str, Any] = {"identity": loaded.identity, "lone_class": lone_class, "parts": parts, "sampler": sampler}
    card = model_card(decisions, target=target, schedule=schedule, **facts)
    (ctx.payload / "README.md").write_text(card, encoding="utf-8")
    saved = time.monotonic()

    metrics: dict[str, Any] = _size_metrics(written, reference)
    if spec.verify:
        metrics |= _self_check(target, written, loaded, state, calls, ctx)
    else:
        ctx.warn("export.verify is off: the folder was not reloaded and compared")
    return StageResult(
        layers=_layers_with_bytes(state, written.table),
        sampler=sampler,
        metrics=metrics,
        bytes_by_part=parts,
        base_model=loaded.identity,
        seconds={"write": saved - started, "self-check": time.monotonic() - saved},
        simulated=bool(state.layers) and (target != "qdm" or not any(map(_runs_integers, decisions))),
        verified="load" if spec.verify else "none",
    )


def _state(source: Artifact) -> QuantState:
    """Codes and scales of the source; none of a plain model that was given a cache schedule."""
    if source.manifest.kind == "cached" and not (source.folder / STATE_FILE).is_file():
        return QuantState(layers={})
    return read_state(source.folder)


def _target(spec: ExportSpec, state: QuantState, ctx: RunContext) -> str:
    """qdm or dequantized; says which where the recipe leaves it open."""
    if not state.layers:
        ctx.events.log("export: nothing is quantized: stock float weights, which need no loader, with the cache schedule beside them")
        return "dequantized"
    if spec.target == "auto":
        ctx.events.log("export: target qdm (the only one that keeps integer codes and step tables)")
    return "qdm" if spec.target == "auto" else spec.target


def _runs_integers(decision: LayerDecision) -> bool:
    return not decision.skipped_why and bool(decision.bits_a) and decision.granularity != "group"


def _copy_schedule(source: Artifact, ctx: RunContext) -> Schedule | None:
    """Carry the cache schedule and its corrections over; None = the source has none."""
    if not (source.folder / SCHEDULE_FILE).is_file():
        return None
    schedule = read_schedule(source.folder)
    names = [SCHEDULE_FILE, *([] if schedule.corrections is None else [schedule.corrections.file])]
    for name in names:
        shutil.copyfile(source.folder / name, ctx.payload / name)
    return schedule


def _attention_warning(count: int, target: str) -> str:
    if target == "qdm":
        return (
            f"the products of {count} attentions are quantized in simulation, by evaluation and mode exact: no integer kernel runs them; "
            "mode auto multiplies queries, keys and values as they come"
        )
    return f"target dequantized leaves the products of {count} attentions in full precision: they are not quantized in this folder"


def _load(ctx: RunContext) -> LoadedPipeline:
    """The base pipeline on the CPU: in float32, where outputs can be compared closely, unless it is large."""
    recipe = ctx.recipe
    precise = recipe.model.model_copy(update={"dtype": "float32"})
    loaded = load_pipeline(precise, recipe.sampler, smoke=ctx.smoke, offline=ctx.offline)
    if sum(p.numel() for p in loaded.denoiser.parameters()) >= LARGE and recipe.model.dtype != "float32":
        loaded.pipeline.to(dtype=getattr(torch, recipe.model.dtype))
    return loaded


def _source_folder(ctx: RunContext) -> Path | None:
    """Folder whose files can stand for the loaded components; None where the components were built or changed in memory."""
    source = resolve_source(ctx.recipe.model, smoke=ctx.smoke, offline=True)
    if source.kind in ("tiny", "file") or (ctx.recipe.model.loras and not ctx.smoke):
        return None
    return source.path


def probe_calls(loaded: LoadedPipeline, ctx: RunContext) -> list[Arguments]:
    """Arguments of the denoiser at the first, middle and last step, as the pipeline makes them; one denoiser call is computed."""
    calls: dict[float, Arguments] = {}
    signature = inspect.signature(type(loaded.denoiser).forward)

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bound = signature.bind(module, *args, **kwargs).arguments
        arguments = {name: value for name, value in bound.items() if name not in ("self", "return_dict") and value is not None}
        calls.setdefault(timestep_of(arguments), arguments)

    handle = loaded.denoiser.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        step_timesteps(loaded, ctx.recipe.sampler)
    finally:
        handle.remove()
    found = list(calls.values())
    return [found[index] for index in sorted({0, len(found) // 2, len(found) - 1})]


def _write_denoiser(target: str, loaded: LoadedPipeline, state: QuantState, folder: Path) -> Written:
    dtype = next(loaded.denoiser.parameters()).dtype
    if target == "qdm":
        tensors, config = writer.packed_tensors(loaded.denoiser, state)
        packed = (*(f"{name}." for name in state.layers), *(f"{name}.{CHILD}." for name in state.attention), f"{TABLES}.")
        expected = {k: v.to(dtype) if v.is_floating_point() and not k.startswith(packed) else v for k, v in tensors.items()}
        stored = {name: writer.compact(name, value) for name, value in tensors.items()}
    else:
        config = None
        expected = stored = writer.dequantized_tensors(loaded.denoiser, state, dtype)
    writer.write_component(folder, loaded.denoiser, stored, config)
    return Written(folder, expected, writer.stored_table(folder))


def _self_check(
    target: str, written: Written, loaded: LoadedPipeline, state: QuantState, calls: list[Arguments], ctx: RunContext
) -> dict[str, float]:
    denoiser, dtype = loaded.denoiser, next(loaded.denoiser.parameters()).dtype
    if target == "qdm":
        apply_state_(denoiser, state)
    else:
        denoiser.load_state_dict(written.expected)
    exported = Export(
        folder=ctx.payload,
        component=loaded.component,
        model=type(denoiser),
        expected=written.expected,
        dtype=str(dtype).removeprefix("torch."),
        lone=written.folder == ctx.payload,
        independent=target != "qdm",
    )
    return check_export(exported, run_probe(denoiser, calls), ctx.resume)


def _fp16_bytes(loaded: LoadedPipeline, rows: int) -> int:
    """Size of the denoiser's weight file were it stored in fp16."""
    return sum(bytes_by_part(tensor_table([], loaded.denoiser, rows, "F16"), []).values())


def _size_metrics(written: Written, fp16_bytes: int) -> dict[str, Any]:
    own = sum(path.stat().st_size for path in writer.weight_files(written.folder))
    return {"denoiser_bytes": own, "denoiser_bytes_fp16": fp16_bytes, "denoiser_size_ratio": own / fp16_bytes}


def _parts(payload: Path, written: Written, decisions: list[LayerDecision]) -> dict[str, int]:
    """Bytes on disk without the card: the denoiser's weights by part, every other component by name, configuration files."""
    files = writer.weight_files(written.folder)
    parts = bytes_by_part(written.table, decisions)
    parts["header"] = sum(path.stat().st_size for path in files) - sum(nbytes(entry) for entry in written.table.values())
    for path in sorted(payload.rglob("*")):
        if path.is_file() and path not in files and path.name != "README.md":
            inside = path.relative_to(payload).parts
            name = inside[0] if len(inside) > 1 and payload / inside[0] != written.folder else "configuration"
            parts[name] = parts.get(name, 0) + path.stat().st_size
    return parts


def _layers_with_bytes(state: QuantState, table: Table) -> list[dict[str, Any]]:
    """Layer rows with the bytes that each takes in the file."""
    own: dict[str, int] = {}
    for name, entry in table.items():
        module = owner_of(name, state.layers)[0]
        own[module] = own.get(module, 0) + nbytes(entry)
    return [{**row, "bytes": own.get(row["name"], 0)} for row in layer_rows(state)]
