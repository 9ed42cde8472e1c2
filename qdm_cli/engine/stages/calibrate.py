"""`calibrate`: full-precision trajectories, then codes and ranges from them."""

from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.artifact import write_json, write_text
from qdm_cli.engine.context import StageResult
from qdm_cli.engine.diffusion.sampling import generate, prompts_for
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore, TrajectoryWriter, batch_done, captured_calls, write_index
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.auto_bits import decide, size_of, table_rows, with_rules
from qdm_cli.engine.evaluation.sensitivity import measure
from qdm_cli.engine.evaluation.sensitivity_page import render_page
from qdm_cli.engine.methods import function_of
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.quant.attention_ranges import with_attention
from qdm_cli.engine.quant.report import layer_rows, weight_metrics
from qdm_cli.engine.quant.row_groups import grouped_rows
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.sensitivity import NO_TABLE, SENSITIVITY_FILE, SENSITIVITY_PAGE, read_sensitivity
from qdm_cli.engine.quant.state import write_state
from qdm_cli.engine.stages._groups import group_keys

CALIBRATION_START = 1_000_000
"""Index of the first calibration sample: its noise is never that of an evaluated image."""

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.state import LayerDecision


def calibrate(spec: Any, source: Artifact | None, ctx: RunContext) -> StageResult:
    """Capture trajectories and choose every code and range. Data-free: the pipeline makes its own inputs.

    Raises:
        InputError: a rule matches nothing, or nothing can be quantized.
        GateFailed: NaN or infinity in a weight or activation.
    """
    recipe = ctx.recipe
    loaded = load_pipeline(
        recipe.model, recipe.sampler, device=ctx.device, smoke=ctx.smoke, offline=ctx.offline, offload=recipe.device.offload
    )
    decisions = resolve(loaded.denoiser, recipe.quantize)
    started = time.monotonic()
    folder = capture(loaded, spec, ctx, ctx.resume / "trajectories", samples=spec.data.samples)
    captured = time.monotonic()
    store = TrajectoryStore(folder)
    decisions, chosen = choose_bits(loaded, decisions, spec, ctx, store)
    measured = time.monotonic()
    sample = partial(own_trajectories, loaded, spec, ctx)
    state = function_of(spec)(loaded.denoiser, spec, ctx, decisions=decisions, store=store, sample=sample)
    if spec.timestep_groups is not None:
        state = grouped_rows(state, group_keys(spec.timestep_groups, loaded, store, ctx))
    state = with_attention(state, loaded.denoiser, recipe.quantize, store, spec.samples_per_step)
    write_state(ctx.payload, state)
    folder.rename(ctx.payload / "trajectories")
    return StageResult(
        layers=layer_rows(state),
        sampler=recipe.sampler.model_dump(mode="json"),
        metrics=weight_metrics(loaded.denoiser, state) | chosen,
        base_model=loaded.identity,
        seeds={"trajectories": recipe.seed},
        seconds={"trajectories": captured - started, "sensitivity": measured - captured, "ranges": time.monotonic() - measured},
        simulated=True,
    )


def choose_bits(
    loaded: LoadedPipeline, decisions: list[LayerDecision], spec: Any, ctx: RunContext, store: TrajectoryStore
) -> tuple[list[LayerDecision], dict[str, Any]]:
    """Measure and publish the sensitivity table, and let `quantize.auto` decide from it.

    Returns:
        Decisions of all layers, and metrics of the choice (empty without `quantize.auto`).

    Raises:
        InputError: there is no table, it is of another model, or the budget is too small.
    """
    auto = ctx.recipe.quantize.auto
    table = measure(loaded, decisions, spec, ctx, store) if spec.sensitivity != "off" else None
    chosen: dict[str, Any] = {}
    if auto is not None:
        used = read_sensitivity(auto.table) if auto.table else table
        if used is None:
            raise InputError(NO_TABLE, path="quantize.auto")
        if used.model != loaded.identity["digest"]:
            raise InputError(f"{auto.table} was measured on another model", path="quantize.auto.table")
        result = decide(decisions, auto, used, loaded.denoiser, table_rows(ctx.recipe), size_of(loaded.denoiser, ctx.recipe))
        decisions, chosen = result.decisions, result.metrics
        ctx.events.log(f"quantize.auto: {result.used:,.6g} of {result.budget:,.6g}, by the error of the {result.by}")
        write_json(ctx.payload / "auto.json", {**result.metrics, "by": result.by, "rules": result.rules})
        table = table and with_rules(table, result)
    if table is not None:
        write_json(ctx.payload / SENSITIVITY_FILE, table.model_dump(mode="json", by_alias=True))
        write_text(ctx.payload / SENSITIVITY_PAGE, render_page(table))
    return decisions, chosen


def own_trajectories(
    loaded: LoadedPipeline, spec: Any, ctx: RunContext, denoiser: nn.Module, folder: Path, *, first: int, samples: int
) -> TrajectoryStore:
    """Trajectories that a changed copy of the denoiser makes by itself; `first`: index of their noise, beyond the calibration samples."""
    pipeline, original = loaded.pipeline, loaded.denoiser
    setattr(pipeline, loaded.component, denoiser)
    try:
        return TrajectoryStore(capture(replace(loaded, denoiser=denoiser), spec, ctx, folder, samples=samples, first=first))
    finally:
        setattr(pipeline, loaded.component, original)


def capture(loaded: LoadedPipeline, spec: Any, ctx: RunContext, folder: Path, *, samples: int, first: int = 0) -> Path:
    """Run the pipeline batch by batch and stream its denoiser calls to disk; finished batches are not run again."""
    recipe, data = ctx.recipe, spec.data
    folder.mkdir(parents=True, exist_ok=True)
    prompts = prompts_for(data.prompts, samples)
    starts = range(0, samples, data.batch)
    for batch, start in enumerate(starts):
        count = min(data.batch, samples - start)
        if not batch_done(folder, batch):
            writer = TrajectoryWriter(folder, batch, data.shard_size)
            with captured_calls(loaded.denoiser, writer.add):
                generate(
                    loaded,
                    recipe.sampler,
                    count=count,
                    prompts=prompts,
                    seed=recipe.seed,
                    batch=count,
                    start=CALIBRATION_START + first + start,
                    output="latent",
                )
            writer.close()
        ctx.events.progress("trajectories", batch + 1, len(starts))
    manifest = {"model": loaded.identity, "sampler": recipe.sampler.model_dump(mode="json"), "seed": recipe.seed, "samples": samples}
    write_index(folder, manifest)
    return folder
