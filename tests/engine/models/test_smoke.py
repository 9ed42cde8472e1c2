"""The tiny stand-ins of `--smoke`."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdm_cli.engine.errors import EnvironmentProblem
from qdm_cli.engine.models import load_pipeline, smoke_sampler
from qdm_cli.engine.models.smoke import smoke_id
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec


@pytest.mark.parametrize(
    ("model", "family"),
    [
        ("tiny:dit", "dit"),
        ("builtin:fashion-unet32", "fashion"),
        ("google/ddpm-cifar10-32", "ddpm"),
        ("google/ddpm-celebahq-256", "ddpm"),
        ("CompVis/ldm-celebahq-256", "ldm"),
        ("CompVis/stable-diffusion-v1-4", "sd"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "sd"),
        ("runwayml/stable-diffusion-v1-5", "sd"),
        ("stabilityai/stable-diffusion-2-1", "sd"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "sdxl"),
        ("stabilityai/sdxl-turbo", "sdxl"),
        ("facebook/DiT-XL-2-256", "dit"),
        ("PixArt-alpha/PixArt-XL-2-512x512", "pixart"),
        ("stabilityai/stable-diffusion-3-medium-diffusers", "sd3"),
        ("stabilityai/stable-diffusion-3.5-large", "sd3"),
        ("black-forest-labs/FLUX.1-dev", "flux"),
        ("./models/my-sdxl-finetune", "sdxl"),
        ("checkpoints/sd15.safetensors", "sd"),
    ],
)
def test_family_by_id(model: str, family: str) -> None:
    assert smoke_id(model) == f"tiny:{family}"


def test_folder_is_known_by_its_pipeline_and_not_by_its_name(tiny_folders, tmp_path: Path) -> None:
    folder = tmp_path / "flux-lookalike"
    folder.symlink_to(tiny_folders("dit"))
    assert smoke_id(str(folder)) == "tiny:dit"


def test_folder_above_the_model_says_nothing(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentProblem):
        smoke_id(str(tmp_path / "flux" / "mine"))


def test_unknown_family_names_what_is_known() -> None:
    with pytest.raises(EnvironmentProblem, match=r"FLUX.*DDIMPipeline") as caught:
        smoke_id("someone/audio-model")
    assert caught.value.exit_code == 3


def test_smoke_loads_the_stand_in_in_float32_without_network_and_loras() -> None:
    model = ModelSpec.model_validate({"id": "facebook/DiT-XL-2-256", "dtype": "float16", "loras": [{"path": "nobody/nothing"}]})
    loaded = load_pipeline(model, SamplerSpec(scheduler="DDIMScheduler"), smoke=True, offline=True)
    assert type(loaded.pipeline).__name__ == "DiTPipeline"
    assert {str(parameter.dtype) for parameter in loaded.denoiser.parameters()} == {"torch.float32"}
    assert loaded.identity["id"] == "tiny:dit"


def test_smoke_sampler_shrinks_steps_and_sizes() -> None:
    sampler = SamplerSpec(steps=50, guidance=7.5, size=(512, 512), scheduler="DDIMScheduler")
    small = smoke_sampler("runwayml/stable-diffusion-v1-5", sampler)
    assert (small.steps, small.size, small.guidance, small.scheduler) == (4, (32, 32), 7.5, "DDIMScheduler")
    assert smoke_sampler("google/ddpm-cifar10-32", SamplerSpec(steps=3, size=(32, 32))) == SamplerSpec(steps=3)
