"""The models that an evaluation compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from qdm_cli.engine.artifact import MANIFEST, Artifact, open_artifact
from qdm_cli.engine.caching.runtime import active_cache, cached
from qdm_cli.engine.caching.runtime.cache import Cache
from qdm_cli.engine.caching.schedule import SCHEDULE_FILE
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.quant.modules import per_input
from qdm_cli.engine.quant.state import STATE_FILE, read_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime.loading import open_pipeline
from qdm_cli.engine.runtime.registration import register
from qdm_cli.engine.runtime.tune import tune_

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext

SIMULATED = (
    "Simulated: this artifact is not exported, so its integers are computed in floating point. Images and errors hold for the exported "
    "model; size on disk, latency, speed and memory do not exist before `qdm export` and are null."
)
SIMULATED_WHY = "simulated: not exported, so no integer kernel runs"
FLOAT_EXPORT = "This export holds float weights with the quantization error in them (target dequantized): no integer kernel runs."


@dataclass(frozen=True)
class Subject:
    """One model under evaluation.

    Attributes:
        loaded: pipeline and denoiser.
        kind: `base`, `simulated` (calibrated or fine-tuned, in floats) or `exported`.
        name: for people.
        digest: of the artifact or of the base model.
        folder: of the exported pipeline; None otherwise.
        layers: rows of the manifest.
        note: what to say in words in every output; None = nothing.
    """

    loaded: LoadedPipeline
    kind: Literal["base", "simulated", "exported"]
    name: str
    digest: str
    folder: Path | None = None
    layers: list[dict[str, Any]] = field(default_factory=list)
    note: str | None = None

    @property
    def denoiser(self) -> nn.Module:
        return self.loaded.denoiser

    @property
    def cache(self) -> Cache | None:
        """The cache schedule that its pipeline follows; None = every call is computed in full."""
        return active_cache(self.denoiser)

    @property
    def quantized(self) -> list[dict[str, Any]]:
        """Rows of the layers that have integer codes."""
        return [row for row in self.layers if row.get("skipped_why") is None and row.get("bits_w")]


def load_base(ctx: RunContext) -> Subject:
    """The recipe's uncompressed model."""
    recipe = ctx.recipe
    loaded = load_pipeline(
        recipe.model, recipe.sampler, device=ctx.device, smoke=ctx.smoke, offline=ctx.offline, offload=recipe.device.offload
    )
    return Subject(loaded, "base", recipe.model.id, str(loaded.identity["digest"]))


def load_subject(source: Artifact, base: Subject, ctx: RunContext) -> Subject:
    """The model of an artifact.

    Raises:
        InputError: an artifact that holds no model.
    """
    kind = source.manifest.kind
    if kind in ("calibrated", "finetuned", "cached"):
        loaded = load_base(ctx).loaded
        if kind != "cached" or (source.folder / STATE_FILE).is_file():
            apply_state_(loaded.denoiser, read_state(source.folder))
        if kind == "cached":
            cached(loaded.pipeline, source.folder).enable()
        return Subject(loaded, "simulated", source.folder.name, source.manifest.digest, layers=source.manifest.layers, note=SIMULATED)
    if kind != "exported":
        raise InputError(f"{source.folder} is {kind}; evaluate takes a calibrated, fine-tuned, cached or exported artifact")
    note = FLOAT_EXPORT if source.manifest.simulated else None
    loaded = _open(source.folder, base, ctx)
    return Subject(loaded, "exported", source.folder.name, source.manifest.digest, source.folder, source.manifest.layers, note)


def load_reference_model(path: Path, base: Subject, ctx: RunContext) -> Subject:
    """The pipeline in a folder, exported by qdm or plain diffusers, as the other side of the comparison.

    Raises:
        InputError: it cannot be loaded.
    """
    artifact = open_artifact(path) if (path / MANIFEST).is_file() else None
    if artifact is not None:
        return load_subject(artifact, base, ctx)
    from qdm_cli.engine.models import model_digest

    digest = model_digest(ctx.recipe.model.model_copy(update={"id": str(path), "revision": None}), offline=ctx.offline)
    return Subject(_open(path, base, ctx), "exported", path.name, digest, path)


def _open(folder: Path, base: Subject, ctx: RunContext) -> LoadedPipeline:
    """An exported folder with the recipe's sampler: its own scheduler has that sampler's settings already, the base's are certain."""
    component = base.loaded.component
    if (folder / "model_index.json").is_file():
        pipeline = open_pipeline(folder, mode="exact", cache=False, torch_dtype=next(base.denoiser.parameters()).dtype)
        pipeline.scheduler = type(base.loaded.pipeline.scheduler).from_config(base.loaded.pipeline.scheduler.config)
    else:
        pipeline = load_base(ctx).loaded.pipeline
        register()
        denoiser = type(base.denoiser).from_pretrained(folder)
        tune_(denoiser, "exact")  # metrics must not depend on which layers this machine would run in floating point
        setattr(pipeline, component, denoiser)
    if (folder / SCHEDULE_FILE).is_file():  # after the scheduler is in its place: the cache follows the one that it finds
        cached(pipeline, folder).enable()
    if ctx.recipe.device.offload == "none" or not ctx.device.startswith("cuda"):
        pipeline.to(ctx.device)
    else:
        pipeline.enable_model_cpu_offload(device=ctx.device)
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline=pipeline, component=component, denoiser=getattr(pipeline, component), identity=base.loaded.identity)


def weight_of(layer: nn.Module) -> Any:
    """The float weight that a layer computes with: [O, K] or [O, I, kh, kw]; None for a layer that has none."""
    if hasattr(layer, "dequantized_weight"):
        return layer.dequantized_weight()
    if hasattr(layer, "weight_source"):
        centred, scale = layer.weight_source()
        groups = 1 if scale.ndim == 1 else scale.shape[1]
        grouped = centred.reshape(centred.shape[0], groups, -1, *centred.shape[2:])
        weight = (grouped * scale.reshape(centred.shape[0], groups, *([1] * (grouped.ndim - 2)))).reshape(centred.shape)
        factors = getattr(layer, "pre_scale", None)
        return weight if factors is None else weight * per_input(factors, weight)
    return getattr(layer, "weight", None)
