"""The tiny pipelines: complete, stock, equal in every process, and not constant."""

from __future__ import annotations

import pytest
import torch

from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import find_denoiser, load_pipeline, smoke_sampler
from qdm_cli.engine.models.tiny import TINY, build_tiny, tiny_class, tiny_denoiser
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec


@pytest.mark.parametrize("name", TINY)
def test_saved_and_loaded_again_it_gives_the_same_images(name: str, tiny_folders) -> None:
    sampler = smoke_sampler(f"tiny:{name}", SamplerSpec(steps=2))
    built = load_pipeline(ModelSpec(id=f"tiny:{name}"), sampler)
    loaded = load_pipeline(ModelSpec(id=str(tiny_folders(name))), sampler)
    assert type(loaded.pipeline).__name__ == tiny_class(name) == type(built.pipeline).__name__
    torch.testing.assert_close(generate(loaded, sampler, count=1), generate(built, sampler, count=1), rtol=0, atol=0)


@pytest.mark.parametrize("name", TINY)
def test_images_differ_and_are_not_constant(name: str) -> None:
    sampler = smoke_sampler(f"tiny:{name}", SamplerSpec(steps=2))
    images = generate(load_pipeline(ModelSpec(id=f"tiny:{name}"), sampler), sampler, count=2, batch=2)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1
    assert images[0].std() > 0.02
    assert (images[0] - images[1]).abs().mean() > 0.01


@pytest.mark.parametrize("name", TINY)
def test_denoiser_alone_has_the_weights_of_the_pipeline(name: str) -> None:
    global_state = torch.get_rng_state()
    alone = tiny_denoiser(name).state_dict()
    inside = find_denoiser(build_tiny(name))[1].state_dict()
    assert alone.keys() == inside.keys()
    assert all(torch.equal(alone[key], inside[key]) for key in alone)
    assert torch.equal(torch.get_rng_state(), global_state), "building must not move the caller's random state"


@pytest.mark.parametrize("name", TINY)
def test_every_weight_of_the_denoiser_reaches_the_output(name: str) -> None:
    """No zero weight matrix, which would hide what lies before it."""
    assert all(parameter.any() for parameter in tiny_denoiser(name).parameters() if parameter.ndim > 1)


def test_unknown_name_is_refused_with_a_guess() -> None:
    with pytest.raises(InputError, match="tiny:sdxl"):
        build_tiny("sdxxl")
