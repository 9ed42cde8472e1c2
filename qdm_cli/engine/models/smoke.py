"""Which tiny pipeline stands in for a model under `--smoke` (interface spec 7)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from qdm_cli.engine.errors import EnvironmentProblem

if TYPE_CHECKING:
    from qdm_cli.engine.recipe.schema import SamplerSpec

SMOKE_STEPS = 4
_SMOKE_SIZE = (32, 32)

# first hit wins; matched against the lower-case id or the folder's own name
_BY_NAME = (
    (r"flux", "flux"),
    (r"stable-diffusion-3|sd-?3(?!\d)", "sd3"),
    (r"pixart", "pixart"),
    (r"(^|/|-|_)dit(-|_|$)", "dit"),
    (r"ldm(?!-text2im)|latent-diffusion", "ldm"),
    (r"sdxl|-xl(-|$)|stable-diffusion-xl|_xl", "sdxl"),
    (r"stable-diffusion|sd-?(1|2|v1|v2|turbo)|dreamlike|dreamshaper|lcm_dreamshaper|openjourney|realistic-vision", "sd"),
    (r"ddpm|ddim|cifar", "ddpm"),
)
_BY_CLASS = {
    "DDIMPipeline": "ddpm",
    "DDPMPipeline": "ddpm",
    "LDMPipeline": "ldm",
    "StableDiffusionPipeline": "sd",
    "LatentConsistencyModelPipeline": "sd",
    "StableDiffusionXLPipeline": "sdxl",
    "DiTPipeline": "dit",
    "PixArtAlphaPipeline": "pixart",
    "PixArtSigmaPipeline": "pixart",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
}
_TEXT_SIZES = {"sd", "sdxl", "pixart", "sd3", "flux"}


def smoke_id(model_id: str) -> str:
    """`tiny:NAME` of the same family as `model_id`; a tiny id stays itself.

    Raises:
        EnvironmentProblem: no family is known for this id.
    """
    if model_id.startswith("tiny:"):
        return model_id
    if model_id.startswith("builtin:"):
        return "tiny:fashion"
    index = Path(model_id).expanduser() / "model_index.json"
    if index.is_file():
        family = _BY_CLASS.get(_class_of(index))
        if family:
            return f"tiny:{family}"
    # the folders above a local model say nothing about it
    text = (Path(model_id).name if model_id.startswith(("/", ".", "~")) else model_id).lower()
    for pattern, family in _BY_NAME:
        if re.search(pattern, text):
            return f"tiny:{family}"
    raise EnvironmentProblem(
        f"--smoke has no tiny model of the family of {model_id}. It knows ids with ddpm, ldm, stable-diffusion (1, 2, xl, 3), "
        "DiT, PixArt and FLUX in their names, folders with one of the pipelines "
        f"{', '.join(_BY_CLASS)}, and builtin:* and tiny:*."
    )


def smoke_sampler(model_id: str, sampler: SamplerSpec) -> SamplerSpec:
    """The recipe's sampler for the tiny stand-in: at most 4 steps, 32x32 images where the pipeline takes a size."""
    family = smoke_id(model_id).partition(":")[2]
    size = _SMOKE_SIZE if family in _TEXT_SIZES else None
    return sampler.model_copy(update={"steps": min(sampler.steps, SMOKE_STEPS), "size": size})


def _class_of(index: Path) -> str:
    try:
        name = json.loads(index.read_text(encoding="utf-8")).get("_class_name", "")
    except (OSError, ValueError, AttributeError):
        return ""
    return name if isinstance(name, str) else ""
