"""`finetune`: train a calibrated denoiser and leave integers."""

from __future__ import annotations

import shutil
import time
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.context import StageResult
from qdm_cli.engine.diffusion.guidance import guidance_order, guidance_scale
from qdm_cli.engine.diffusion.sampling import generate, prompts_for
from qdm_cli.engine.diffusion.trajectories import captured_calls, sample_tensor
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.methods import function_of
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.quant.distillation import Call, Trajectories, write_tensorboard
from qdm_cli.engine.quant.low_rank import ADAPTERS_FILE
from qdm_cli.engine.quant.report import bit_metrics, layer_rows, weight_metrics
from qdm_cli.engine.quant.scale_config import AdaptConfig
from qdm_cli.engine.quant.scale_set import SCALES_FILE
from qdm_cli.engine.quant.state import read_state, write_state
from qdm_cli.engine.stages._adapt import adapt_inputs

TRAINING_START = 2_000_000
"""Index of the first training sample: its noise is that of no calibration sample and of no evaluated image."""

if TYPE_CHECKING:
    from qdm_cli.engine.artifact import Artifact
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.recipe.schema import SamplerSpec


def finetune(spec: Any, source: Artifact | None, ctx: RunContext) -> StageResult:
    """Train what `calibrate` initialised: on trajectories that the full-precision pipeline makes itself, or on images of the recipe.

    Raises:
        InputError: no calibrated artifact was given.
        GateFailed: training diverged; names the layer.
    """
    if source is None:
        raise InputError("finetune needs a calibrated artifact: run `qdm calibrate` on the same recipe first, or pass --from DIR.")
    recipe = ctx.recipe
    state = read_state(source.folder)
    if state.low_rank or not state.layers:
        raise InputError("finetune: the source was trained by method qlora or full; start from its calibrated artifact (--from DIR)")
    loaded = load_pipeline(
        recipe.model, recipe.sampler, device=ctx.device, smoke=ctx.smoke, offline=ctx.offline, offload=recipe.device.offload
    )
    started = time.monotonic()
    if isinstance(spec, AdaptConfig):
        given: dict[str, Any] = {"inputs": adapt_inputs(loaded, spec, ctx)}
    else:
        given = {"trajectories": trajectories_of(loaded, spec, ctx)}
    trained, metrics = function_of(spec)(loaded.denoiser, spec, ctx, state=state, **given)
    write_state(ctx.payload, trained)
    personal = [ctx.payload / name for name in (SCALES_FILE, ADAPTERS_FILE) if (ctx.payload / name).exists()]
    if personal:
        metrics["personalisation_bytes"] = sum(path.stat().st_size for path in personal)
    log_file = ctx.resume / "metrics.jsonl"
    shutil.copyfile(log_file, ctx.payload / "metrics.jsonl")
    if "tensorboard" in spec.log:
        write_tensorboard(log_file, ctx.payload / "tb")
    return StageResult(
        layers=layer_rows(trained),
        sampler=recipe.sampler.model_dump(mode="json"),
        metrics=metrics | (bit_metrics(trained) if isinstance(spec, AdaptConfig) else weight_metrics(loaded.denoiser, trained)),
        base_model=loaded.identity,
        seeds={"trajectories": recipe.seed, "adapters": recipe.seed},
        seconds={"train": time.monotonic() - started},
        simulated=True,
    )


def trajectories_of(loaded: LoadedPipeline, spec: Any, ctx: RunContext) -> Trajectories:
    """Full-precision calls of the training sampler; every pool has noise of its own."""
    sampler = train_sampler(ctx.recipe.sampler, spec)
    count = spec.batch_size
    prompts = prompts_for("builtin:captions-128", 128)

    latest: dict[int, list[Call]] = {}

    def run(pool: int) -> list[Call]:
        # the first pool is asked for three times: its guidance, its timesteps, its training
        if pool in latest:
            return latest[pool]
        calls: list[Call] = []

        def keep(arguments: dict[str, Any], output: Any) -> None:
            calls.append((arguments, output.detach().clone()))

        start = TRAINING_START + pool * count
        with captured_calls(loaded.denoiser, keep):
            generate(loaded, sampler, count=count, prompts=prompts, seed=ctx.recipe.seed, batch=count, start=start, output="latent")
        latest.clear()
        latest[pool] = calls
        return calls

    first = sample_tensor(run(0)[0][0])
    order = guidance_order(type(loaded.pipeline).__name__, int(first.shape[0]), count)
    return Trajectories(run=run, order=order, guidance=guidance_scale(loaded.pipeline, sampler))


def train_sampler(deployed: SamplerSpec, spec: Any) -> SamplerSpec:
    """The deployment sampler with the fields that `finetune.sampler` overrides."""
    return deployed.model_copy(update=spec.sampler.model_dump(exclude_none=True))
