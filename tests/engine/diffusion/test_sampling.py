"""Sampling through whole pipelines: one generator per sample, arguments by signature, timesteps as the denoiser sees them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from qdm_cli.engine.diffusion.sampling import batches, call_arguments, generate, native_size, step_timesteps
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline, smoke_sampler
from qdm_cli.engine.models.tiny import TINY
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec


@cache
def tiny(name: str, scheduler: str | None = None) -> LoadedPipeline:
    return load_pipeline(ModelSpec(id=f"tiny:{name}"), SamplerSpec(scheduler=scheduler))


def small(name: str, **changes: Any) -> SamplerSpec:
    return smoke_sampler(f"tiny:{name}", SamplerSpec(**{"steps": 2, **changes}))


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the rounding of differently shaped matrix products."""
    return a.shape == b.shape and bool((a - b).abs().max() < 1e-4)


@pytest.mark.parametrize("name", TINY)
def test_samples_do_not_depend_on_the_batch(name: str) -> None:
    together = generate(tiny(name), small(name), count=3, seed=7, batch=3)
    assert same(generate(tiny(name), small(name), count=3, seed=7, batch=2), together)
    assert same(generate(tiny(name), small(name), count=1, start=2, seed=7, batch=2), together[2:])


@pytest.mark.parametrize(
    ("name", "scheduler"), [("ddpm", None), ("dit", None), ("ldm", None), ("sd", None), ("sd", "EulerAncestralDiscreteScheduler")]
)
def test_noise_of_every_step_comes_from_the_samples_generator(name: str, scheduler: str | None) -> None:
    """Also where the pipeline gives its scheduler no generator (DiT, LDM)."""
    noisy, calm = small(name, eta=1.0), small(name, eta=0.0)
    model = tiny(name, scheduler)
    torch.manual_seed(1)
    together = generate(model, noisy, count=2, seed=3, batch=2)
    torch.manual_seed(2)
    assert same(generate(model, noisy, count=2, seed=3, batch=1), together)
    if scheduler is None:
        assert not same(generate(model, calm, count=2, seed=3, batch=2), together), "eta must reach the scheduler"


def test_pixel_model_with_ddpm_scheduler_is_reproducible() -> None:
    model = tiny("ddpm", "DDPMScheduler")
    torch.manual_seed(1)
    together = generate(model, small("ddpm"), count=2, batch=2)
    torch.manual_seed(2)
    assert same(generate(model, small("ddpm"), count=2, batch=1), together)


def test_seed_and_start_number_the_samples() -> None:
    images = generate(tiny("ddpm"), small("ddpm"), count=3, seed=10)
    assert same(generate(tiny("ddpm"), small("ddpm"), count=2, seed=11), images[1:])
    assert same(generate(tiny("ddpm"), small("ddpm"), count=2, seed=10, start=1), images[1:])
    assert not same(images[:1], images[1:2])


def test_classes_and_prompts_are_taken_in_turn() -> None:
    calls: list[Any] = []
    pipeline = tiny("dit").pipeline
    handle = pipeline.transformer.register_forward_pre_hook(lambda m, a, kw: calls.append(kw["class_labels"].tolist()), with_kwargs=True)
    generate(tiny("dit"), small("dit", steps=1, guidance=1.0), count=3, start=998, batch=3)
    handle.remove()
    assert calls == [[998, 999, 0]]
    sampler = small("sd")
    turned = generate(tiny("sd"), sampler, prompts=["a cat", "a dog"], count=3, seed=0)
    again = generate(tiny("sd"), sampler, prompts=["a dog"], count=1, start=1, seed=0)
    assert same(turned[1:2], again)
    assert not same(turned[1:2], generate(tiny("sd"), sampler, prompts=["a cat"], count=1, start=1, seed=0))
    assert len(generate(tiny("sd"), sampler, prompts=["a", "b"])) == 2


def test_batches_stream_and_report() -> None:
    done: list[tuple[int, int]] = []
    stream = batches(tiny("ddpm"), small("ddpm"), count=5, batch=2, progress=lambda now, total: done.append((now, total)))
    assert next(stream).shape == (2, 3, 16, 16)
    assert done == []
    assert [len(part) for part in stream] == [2, 1]
    assert done == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize("name", TINY)
def test_latents_are_what_the_last_step_gave(name: str) -> None:
    pipeline = tiny(name).pipeline
    latents = generate(tiny(name), small(name), count=2, seed=3, output="latent")
    assert latents.dtype == torch.float32
    assert len(latents) == 2
    images = generate(tiny(name), small(name), count=2, seed=3)
    if name in ("ddpm", "fashion"):
        decoded = latents
    elif name == "flux":
        decoded = pipeline._unpack_latents(latents, 32, 32, pipeline.vae_scale_factor)
    else:
        decoded = latents
    vae = getattr(pipeline, "vae", None) or getattr(pipeline, "vqvae", None)
    if vae is not None:
        decoded = vae.decode(decoded / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)).sample
    assert same((decoded / 2 + 0.5).clamp(0, 1), images)


def test_results_can_be_trained_on() -> None:
    weight = torch.ones((), requires_grad=True)
    (generate(tiny("ddpm"), small("ddpm"), count=1) * weight).sum().backward()
    assert weight.grad is not None


def test_guidance_only_where_the_pipeline_has_it() -> None:
    with pytest.raises(InputError, match=r"sampler\.guidance.*DDIMPipeline"):
        generate(tiny("ddpm"), small("ddpm", guidance=2.0), count=1)
    plain = generate(tiny("sd"), small("sd", guidance=1.0), count=1)
    assert not same(generate(tiny("sd"), small("sd", guidance=9.0), count=1), plain)


def test_size_only_where_the_pipeline_has_it() -> None:
    with pytest.raises(InputError, match=r"sampler\.size.*\(16, 16\)"):
        generate(tiny("ddpm"), SamplerSpec(steps=1, size=(32, 32)), count=1)
    assert generate(tiny("ddpm"), SamplerSpec(steps=1, size=(16, 16)), count=1).shape == (1, 3, 16, 16)
    assert native_size(tiny("dit").pipeline) == (16, 16)
    assert generate(tiny("sd"), SamplerSpec(steps=1, size=(48, 32)), count=1).shape == (1, 3, 48, 32)
    assert generate(tiny("pixart"), SamplerSpec(steps=1, size=(64, 32)), count=1).shape == (1, 3, 64, 32)


def test_pipeline_that_needs_more_than_noise_is_refused() -> None:
    class ImageToImage:
        def __call__(self, image: Any, prompt: str = "", num_inference_steps: int = 1, **kwargs: Any) -> None: ...

    with pytest.raises(InputError, match="ImageToImage needs image"):
        call_arguments(ImageToImage(), SamplerSpec())


def seen_timesteps(model: LoadedPipeline, sampler: SamplerSpec) -> list[float]:
    seen: dict[float, None] = {}

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        seen.setdefault(float(torch.as_tensor(timestep).flatten()[0]))

    handle = model.denoiser.register_forward_pre_hook(hook, with_kwargs=True)
    generate(model, sampler, count=1)
    handle.remove()
    return list(seen)


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        *((name, None) for name in TINY),
        ("sd", "HeunDiscreteScheduler"),
        ("sd", "DPMSolverMultistepScheduler"),
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
        ("sd3", "DPMSolverMultistepScheduler"),
        ("flux", "UniPCMultistepScheduler"),
        ("dit", "DPMSolverMultistepScheduler"),
    ],
)
def test_step_timesteps_are_those_of_a_real_run(name: str, scheduler: str | None) -> None:
    model, sampler = tiny(name, scheduler), small(name, steps=4)
    found = step_timesteps(model, sampler)
    assert found == seen_timesteps(model, sampler)
    assert len(found) >= 4
    assert found == sorted(found, reverse=True)


def test_step_timesteps_cost_one_call_and_leave_the_denoiser_alone() -> None:
    model, calls = tiny("ddpm"), []
    handle = model.denoiser.conv_in.register_forward_hook(lambda *_: calls.append(1))
    assert len(step_timesteps(model, SamplerSpec(steps=10))) == 10
    handle.remove()
    assert len(calls) == 1
    assert "forward" not in vars(model.denoiser)
    assert "step" not in vars(model.pipeline.scheduler)
