"""Loading diffusers pipelines, finding the denoiser, the roles of its layers, tiny models."""

from qdm_cli.engine.models.denoiser import find_denoiser
from qdm_cli.engine.models.identity import model_digest
from qdm_cli.engine.models.load import LoadedPipeline, load_pipeline
from qdm_cli.engine.models.memory import align_
from qdm_cli.engine.models.meta import meta_denoiser
from qdm_cli.engine.models.roles import layer_roles
from qdm_cli.engine.models.smoke import smoke_sampler

__all__ = [
    "LoadedPipeline",
    "align_",
    "find_denoiser",
    "layer_roles",
    "load_pipeline",
    "meta_denoiser",
    "model_digest",
    "smoke_sampler",
]
