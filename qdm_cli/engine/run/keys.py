"""What determines a result: the key of a stage, and the checks between an artifact and a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdm_cli.engine.artifact import SCHEMA, Artifact, hash_file, hash_json
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.sensitivity import SENSITIVITY_FILE
from qdm_cli.engine.recipe.schema import Recipe

ORDER = ("calibrate", "finetune", "cache", "export", "evaluate")
KINDS = {"calibrate": "calibrated", "finetune": "finetuned", "cache": "cached", "export": "exported", "evaluate": "evaluated"}

# Sections of the recipe that a stage reads besides its own; what it gets through its parent is in the parent's digest.
READS = {
    "calibrate": ("model", "sampler", "seed", "quantize"),
    "finetune": ("model", "sampler", "seed", "quantize"),
    "cache": ("model", "sampler", "seed"),
    "export": ("model", "sampler", "quantize"),
    "evaluate": ("model", "sampler", "seed"),
}
NO_EFFECT = ("checkpoint_every", "log_every", "log")
"""Fields of a stage's own section that change no result."""

PREDECESSORS: dict[str, tuple[str, ...]] = {
    "calibrate": (),
    "finetune": ("calibrate",),
    "cache": ("finetune", "calibrate"),
    "export": ("cache", "finetune", "calibrate"),
    "evaluate": ("export", "cache", "finetune", "calibrate"),
}


def stage_key(stage: str, recipe: Recipe, *, parent: str | None, base_model: str, version: str, smoke: bool = False) -> str:
    """sha256 of everything that affects the stage's result; not the device, logging, output folder or name.

    Args:
        parent: digest of the source artifact; None = no source.
        base_model: digest of the uncompressed model.
        version: version of qdm, of which major and minor count.
    """
    dump = recipe.model_dump(mode="json")
    sections = {name: dump[name] for name in READS[stage]}
    own = {name: value for name, value in (dump[stage] or {}).items() if name not in NO_EFFECT}
    if "quantize" in sections and recipe.quantize.auto is not None and (table := recipe.quantize.auto.table):
        sections["quantize"] = {**sections["quantize"], "table_sha256": _table_hash(Path(table).expanduser())}
    if Path(recipe.model.id).exists():  # a folder is the same model wherever it lies
        sections["model"] = {name: value for name, value in sections["model"].items() if name != "id"}
    facts = {"stage": stage, "sections": sections, "own": own, "parent": parent, "base_model": base_model, "smoke": smoke}
    return hash_json({**facts, "qdm": ".".join(version.split(".")[:2]), "schema": SCHEMA})


def _table_hash(path: Path) -> str | None:
    """Content of a sensitivity table; None = not there, which the stage says."""
    path = path / SENSITIVITY_FILE if path.is_dir() else path
    return hash_file(path) if path.is_file() else None


def check_source(source: Artifact, recipe: Recipe, *, base_model: str, smoke: bool) -> None:
    """Refuse an artifact that was made from another model, for another sampler, or by --smoke.

    Raises:
        InputError: names both values.
    """
    manifest = source.manifest
    if manifest.smoke != smoke:
        made, wanted = ("with", "without") if manifest.smoke else ("without", "with")
        raise InputError(f"{source.folder} was made {made} --smoke and this run is {wanted} it")
    theirs = manifest.base_model.get("digest")
    if theirs is not None and theirs != base_model:
        was = f"{manifest.base_model.get('id')} ({theirs[:12]})"
        raise InputError(
            f"model.id: {source.folder} was made from {was}, the recipe names {recipe.model.id} ({base_model[:12]})", path="model.id"
        )
    for name, value in recipe.sampler.model_dump(mode="json").items():
        held = manifest.sampler.get(name, value)
        if held != value:
            message = f"sampler.{name}: {source.folder} holds for {_shown(held)}, the recipe says {_shown(value)}"
            raise InputError(message, path=f"sampler.{name}")


def _shown(value: Any) -> str:
    return "the pipeline's own" if value is None else str(value)
