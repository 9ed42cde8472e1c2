"""Opens an exported folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.runtime.registration import register, registration_status

if TYPE_CHECKING:
    from qdm_cli.engine.runtime.choice import Mode


def open_pipeline(
    folder: str | Path,
    *,
    mode: str | None = None,
    scales: str | Path | None = None,
    cache: bool | str | Path = True,
    device: str | None = None,
    graphs: bool | None = None,
    **kwargs: Any,
) -> Any:
    """`DiffusionPipeline.from_pretrained` of an exported folder, with errors that say what to do.

    Args:
        mode: auto = every layer on the arithmetic that is fastest here; exact = quantized arithmetic everywhere, the same bits on every
            machine; None = QDM_MODE, else auto.
        scales: a personalisation to apply: a scale file, or the folder of `qdm finetune` that holds one; None = as exported.
        cache: True = follow the folder's schedule, if it has one; False = none; or a schedule to follow instead.
        device: where the whole pipeline goes; None = where diffusers puts it.
        graphs: replay the denoiser from CUDA graphs, along the schedule as well; None = where it lies on a CUDA device now and can be.

    Raises:
        InputError: no such folder, an artifact that is not exported yet, a lone component, corrupt files, an unknown mode, or scales or a
            schedule that belong to another model.
        EnvironmentProblem: this diffusers does not take qdm's quantizer.
    """
    folder = check_export(folder)
    from qdm_cli.engine.caching.runtime import cached
    from qdm_cli.engine.caching.schedule import SCHEDULE_FILE
    from qdm_cli.engine.models.denoiser import find_denoiser
    from qdm_cli.engine.quant.scale_set import read_scales
    from qdm_cli.engine.runtime.choice import default_mode
    from qdm_cli.engine.runtime.scales import apply_scales_

    _register()
    try:
        chosen = default_mode(mode)
    except ValueError as error:
        raise InputError(str(error)) from None
    personal = None if scales is None else read_scales(scales)
    pipeline = _from_pretrained(folder, kwargs)
    if personal is not None:
        apply_scales_(find_denoiser(pipeline)[1], personal, str(scales))
    _tune_(pipeline, chosen)
    place = folder if cache is True else cache
    if place and (cache is not True or (folder / SCHEDULE_FILE).is_file()):
        cached(pipeline, place).enable()
    if device is not None:
        pipeline.to(device)
    return graphed(pipeline) if graphs or (graphs is None and _replays(pipeline)) else pipeline


def _replays(pipeline: Any) -> bool:
    """Is the denoiser on a GPU, with nothing against CUDA graphs? Either way the log says so."""
    from qdm_cli.engine.models.denoiser import find_denoiser
    from qdm_cli.engine.runtime import gpu
    from qdm_cli.engine.runtime.graphs import why_not

    denoiser = find_denoiser(pipeline)[1]
    if not gpu.is_gpu(denoiser.device):
        return False
    why = why_not(denoiser)
    said = "the denoiser is replayed from CUDA graphs; load(..., graphs=False) leaves them out" if why is None else f"no CUDA graphs: {why}"
    logging.getLogger(__name__).info(said)
    return why is None


def _register() -> None:
    register()
    from diffusers import DiffusionPipeline  # noqa: F401  registration waits for the import behind it

    status = registration_status()
    if status["state"] != "registered":
        raise EnvironmentProblem(f"qdm is not registered with diffusers: {status['why']}")


def _from_pretrained(folder: Path, kwargs: dict[str, Any]) -> Any:
    from diffusers import DiffusionPipeline
    from safetensors import SafetensorError

    try:
        return DiffusionPipeline.from_pretrained(folder, **kwargs)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}") from error


def _tune_(pipeline: Any, mode: Mode) -> None:
    """Choose the arithmetic of every part that has packed layers."""
    from qdm_cli.engine.runtime.packed import PackedLayer
    from qdm_cli.engine.runtime.tune import tune_

    for part in pipeline.components.values():
        if any(isinstance(layer, PackedLayer) for layer in getattr(part, "modules", tuple)()):
            tune_(part, mode)


def graphed(pipeline: Any, *, limit: int | None = None) -> Any:
    """Replay the denoiser of a pipeline from CUDA graphs; returns the pipeline. A cache may be switched on before or after.

    Args:
        limit: graphs kept at a time of each function: the denoiser, and two more for every cut of a cache; None = `graphs.LIMIT`.

    Raises:
        InputError: the denoiser has no packed layers, is offloaded, or is compiled, by itself or along a cache.
    """
    from qdm_cli.engine.models.denoiser import find_denoiser
    from qdm_cli.engine.runtime.graphs import LIMIT, Graphs

    Graphs(find_denoiser(pipeline)[1], limit or LIMIT).enable()
    return pipeline


def check_export(folder: str | Path) -> Path:
    """The absolute path of a folder that holds a whole pipeline.

    Raises:
        InputError: as in `open_pipeline`.
    """
    folder = Path(folder).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if (folder / "model_index.json").is_file():
        return folder
    kind = _kind(folder / "qdm.json")
    if kind in ("calibrated", "finetuned", "cached"):
        raise InputError(f"{folder} is a {kind} artifact, which diffusers cannot open. Export it first: qdm export RECIPE --from {folder}")
    if kind == "exported":
        raise InputError(f"{folder} holds the denoiser alone (component_only): load it with from_pretrained of its diffusers class.")
    raise InputError(f"{folder} is no diffusers pipeline: it has no model_index.json")


def _kind(manifest: Path) -> str | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8")).get("kind")
    except (OSError, ValueError, AttributeError):
        return None
