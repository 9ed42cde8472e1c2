"""Pipelines along a schedule: which calls are full, what is kept, what falls open, and what is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionImg2ImgPipeline, schedulers
from torch import nn

import qdm_cli
from qdm_cli.engine.caching import rules
from qdm_cli.engine.caching.runtime import Cache, find_cut
from qdm_cli.engine.caching.runtime.follow import FromSchedule
from qdm_cli.engine.caching.runtime.kept import Store, same
from qdm_cli.engine.caching.schedule import ModelRef, Schedule, hash_config, make_actions, schedule_from_refreshes
from qdm_cli.engine.caching.trace import trace_sampler
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

STEPS = 10
DDIM = "DDIMScheduler"
SCHEDULERS = (
    DDIM,
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "PNDMScheduler",
    "LCMScheduler",
    "UniPCMultistepScheduler",
)


def spec_of(scheduler: str = DDIM, steps: int = STEPS, **more: Any) -> SamplerSpec:
    return SamplerSpec(scheduler=scheduler, steps=steps, **more)


@pytest.fixture(scope="module")
def ddpm() -> LoadedPipeline:
    return load_pipeline(ModelSpec(id="tiny:ddpm"), spec_of())


@pytest.fixture(scope="module")
def sd() -> LoadedPipeline:
    return load_pipeline(ModelSpec(id="tiny:sd"), spec_of())


def run(loaded: LoadedPipeline, count: int = 1, **more: Any) -> torch.Tensor:
    return generate(loaded, spec_of(**more), count=count, batch=count, output="latent")


@contextmanager
def watched(denoiser: Any) -> Iterator[list[str]]:
    """full or partial for each denoiser call, by whether its middle block ran."""
    seen: list[str] = []
    middle: list[int] = []
    handles = [
        denoiser.mid_block.register_forward_hook(lambda *_: middle.append(1)),
        denoiser.register_forward_hook(lambda *_: seen.append("full" if middle else "partial") or middle.clear()),
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def full_calls(seen: list[str]) -> list[int]:
    return [call for call, kind in enumerate(seen) if kind == "full"]


def schedule_for(loaded: LoadedPipeline, refreshes: tuple[int, ...], *, m: int = 1, **sampler: Any) -> Schedule:
    denoiser = loaded.denoiser
    reference, guidance = trace_sampler(loaded, spec_of(**sampler))
    model = ModelRef(class_=type(denoiser).__name__, config_sha256=hash_config(denoiser.config))
    cuts = [find_cut(denoiser, m)]
    return schedule_from_refreshes(refreshes, cuts=cuts, model=model, sampler=reference, guidance=guidance)


def with_scheduler(loaded: LoadedPipeline, name: str) -> LoadedPipeline:
    base = loaded.pipeline.scheduler
    pipeline = type(loaded.pipeline)(**{**loaded.pipeline.components, "scheduler": getattr(schedulers, name).from_config(base.config)})
    pipeline.set_progress_bar_config(disable=True)
    return replace(loaded, pipeline=pipeline)


class TestTraces:
    @pytest.mark.filterwarnings("ignore::DeprecationWarning")
    @pytest.mark.parametrize("name", SCHEDULERS)
    def test_full_calls_are_the_planned_ones(self, sd: LoadedPipeline, name: str) -> None:
        """Uniform 1:N counts steps: second-order solvers refresh at the first call of a step."""
        loaded = with_scheduler(sd, name)
        reference, _ = trace_sampler(loaded, spec_of(name, guidance=1.0))
        for interval in (2, 3, 5):
            wanted = rules.to_calls(rules.uniform(STEPS, interval), reference.step_of_call)
            with qdm_cli.cached(loaded.pipeline, interval=interval) as cache, watched(sd.denoiser) as seen:
                run(loaded, scheduler=name, guidance=1.0)
            assert full_calls(seen) == list(wanted) and len(seen) == reference.calls
            assert cache.summary()["fell_open"] == {}

    @pytest.mark.parametrize(
        "name", [DDIM, "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
    )
    def test_image_to_image_begins_in_the_middle(self, sd: LoadedPipeline, name: str) -> None:
        """Five strengths in a row through one cache: the first call is full wherever it is, later ones as planned for the whole grid."""
        loaded = with_scheduler(sd, name)
        pipeline = StableDiffusionImg2ImgPipeline(**loaded.pipeline.components, requires_safety_checker=False)
        pipeline.set_progress_bar_config(disable=True)
        reference, _ = trace_sampler(loaded, spec_of(name, guidance=1.0))
        planned = set(rules.to_calls(rules.uniform(STEPS, 4), reference.step_of_call))
        image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        arguments: dict[str, Any] = {"prompt": "a cat", "image": image, "num_inference_steps": STEPS, "guidance_scale": 1.0}
        with qdm_cli.cached(pipeline, interval=4) as cache:
            for strength in (1.0, 0.3, 0.5, 0.8, 0.2):
                with watched(sd.denoiser) as seen:
                    pipeline(**arguments, strength=strength, output_type="latent", generator=torch.Generator().manual_seed(1))
                first = reference.calls - len(seen)
                assert [first + call for call in full_calls(seen)] == [first, *sorted(call for call in planned if call > first)]
        assert cache.summary()["fell_open"] == {} and cache.summary()["trajectories"] == 5

    def test_a_schedule_without_gaps_changes_no_bit(self, ddpm: LoadedPipeline, sd: LoadedPipeline) -> None:
        for loaded, more in ((ddpm, {}), (sd, {"guidance": 3.0})):
            plain = run(loaded, 2, **more)
            with qdm_cli.cached(loaded.pipeline, interval=1):
                assert torch.equal(run(loaded, 2, **more), plain)
            assert torch.equal(run(loaded, 2, **more), plain)

    def test_cached_samples_are_those_of_the_definition(self, ddpm: LoadedPipeline) -> None:
        """DDIM written out, with the partial forward at every second step."""
        from qdm_cli.engine.caching.runtime import SplitDenoiser

        with qdm_cli.cached(ddpm.pipeline, interval=2, cut=2):
            found = run(ddpm)
        split, scheduler = SplitDenoiser(ddpm.denoiser, find_cut(ddpm.denoiser, 2)), ddpm.pipeline.scheduler
        config = ddpm.denoiser.config
        x = torch.randn((1, config.in_channels, config.sample_size, config.sample_size), generator=torch.Generator().manual_seed(0))
        scheduler.set_timesteps(STEPS)
        feature = None
        with torch.no_grad():
            for index, t in enumerate(scheduler.timesteps):
                if index % 2 == 0:
                    noise, feature = split.full(x, t)
                else:
                    noise = split.partial(feature, x, t)
                x = scheduler.step(noise.sample, t, x).prev_sample
        torch.testing.assert_close(found, x, atol=1e-5, rtol=1e-5)

    def test_guidance_in_two_calls_equals_one_doubled_batch(self, sd: LoadedPipeline) -> None:
        rng = torch.Generator().manual_seed(2)
        unet, scheduler = sd.denoiser, sd.pipeline.scheduler
        width = unet.config.cross_attention_dim
        prompts = torch.randn(2, 4, width, generator=rng)
        halves = [half.clone() for half in prompts.split(1)]
        start = torch.randn(1, 4, 8, 8, generator=rng)

        def sample(guess: Callable[[torch.Tensor, Any], torch.Tensor]) -> torch.Tensor:
            scheduler.set_timesteps(STEPS)
            x = start
            for t in scheduler.timesteps:
                one, two = guess(x, t)
                x = scheduler.step(one + 3.0 * (two - one), t, x).prev_sample
            return x

        with torch.no_grad(), qdm_cli.cached(sd.pipeline, interval=4) as cache:
            batched = sample(lambda x, t: unet(torch.cat([x, x]), t, encoder_hidden_states=prompts).sample.split(1))
            assert cache.summary()["tensors"] == 1
            apart = sample(lambda x, t: [unet(x, t, encoder_hidden_states=half).sample for half in halves])
            assert cache.summary()["tensors"] == 2, "one for each branch"
            assert cache.summary()["fell_open"] == {}
        torch.testing.assert_close(batched, apart, atol=1e-5, rtol=1e-4)

    def test_a_second_image_equals_the_first(self, sd: LoadedPipeline) -> None:
        with qdm_cli.cached(sd.pipeline, interval=3):
            assert torch.equal(run(sd, guidance=2.0), run(sd, guidance=2.0))

    def test_transformers(self) -> None:
        loaded = load_pipeline(ModelSpec(id="tiny:dit"), spec_of())
        plain = run(loaded)
        with qdm_cli.cached(loaded.pipeline, interval=2) as cache:
            assert not torch.equal(run(loaded), plain)
        assert (cache.summary()["full"], cache.summary()["partial"]) == (5, 5)


@pytest.mark.parametrize("name", ["tiny:ddpm", "tiny:dit"])
def test_compiled_halves_are_one_graph_each(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over all steps of two trajectories, without recompiling; the poison of tests hides `torch.empty` from the compiler."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "empty_like", getattr(torch.empty_like, "__wrapped__", torch.empty_like))
    loaded = load_pipeline(ModelSpec(id=name), spec_of())
    with qdm_cli.cached(loaded.pipeline, interval=3):
        wanted = run(loaded)
    torch._dynamo.reset()
    counters.clear()
    with qdm_cli.cached(loaded.pipeline, interval=3, compile={"backend": "eager"}):
        assert torch.equal(run(loaded), wanted)
        run(loaded)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"] and not counters["recompiles"]


class TestKept:
    def test_one_tensor_and_none_afterwards(self, ddpm: LoadedPipeline) -> None:
        cut = find_cut(ddpm.denoiser, 2)
        with qdm_cli.cached(ddpm.pipeline, interval=STEPS, cut=2) as cache:
            run(ddpm, 2)
            side = ddpm.denoiser.config.sample_size // int(cut.downscale or 1)
            assert cache.summary()["tensors"] == 1
            assert cache.summary()["bytes"] == 4 * 2 * int(cut.channels or 0) * side**2
        assert cache.summary()["tensors"] == 0 and cache.summary()["bytes"] == 0

    def test_partial_calls_do_not_write_into_it(self, ddpm: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
        stored: list[tuple[torch.Tensor, torch.Tensor]] = []
        put = Store.put
        monkeypatch.setattr(Store, "put", lambda self, value: (stored.append((value, value.clone())), put(self, value))[1])
        with qdm_cli.cached(ddpm.pipeline, interval=3):
            run(ddpm)
        assert len(stored) == 3 and all(torch.equal(value, before) for value, before in stored)

    def test_as_int8(self, ddpm: LoadedPipeline) -> None:
        plan = schedule_for(ddpm, (0, 5))
        small = plan.model_copy(update={"cuts": (plan.cuts[0].model_copy(update={"store_dtype": "int8"}),)})
        found, held = [], []
        for schedule in (plan, small):
            with qdm_cli.cached(ddpm.pipeline, schedule) as cache:
                found.append(run(ddpm))
                held.append(cache.summary()["bytes"])
        assert held[1] < 0.3 * held[0]
        assert 0 < (found[0] - found[1]).norm() < 0.05 * found[0].norm()

    def test_linear_extrapolation(self, ddpm: LoadedPipeline) -> None:
        """Exact where the tensor moves on a line; the first segment, which has one full call behind it, reuses plainly."""
        plan = schedule_for(ddpm, (0, 3, 6))
        actions = make_actions((0, 3, 6), STEPS, "up1", order=1)
        assert [action.order for action in actions] == [0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
        read: list[float] = []
        shape, plain = (1, int(plan.cuts[0].channels or 0), 1, 1), ddpm.denoiser.forward
        with qdm_cli.cached(ddpm.pipeline, plan.model_copy(update={"actions": actions})) as cache:
            split = cache._splits["up1"]
            full, count = split.run_full, iter((0, 3, 6))
            split.run_full = lambda *a: (full(*a)[0], torch.full(shape, float(next(count))))  # type: ignore[method-assign]
            split.run_partial = lambda call, feature, *a: read.append(float(feature.mean())) or plain(*a[0], **a[1])
            run(ddpm)
            assert cache.summary()["tensors"] == 2
        assert read == [0, 0, 4, 5, 7, 8, 9]

    def test_int8_is_within_half_a_code(self) -> None:
        value = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
        store = Store(int8=True, fixed=False)
        store.put(value)
        assert ((store.get() - value).abs() <= value.abs().amax((2, 3), keepdim=True) / 127 / 2 * 1.001).all()

    def test_fixed_memory_stays_in_place(self) -> None:
        store = Store(int8=False, fixed=True)
        store.put(torch.ones(2, 3))
        place = store.get().data_ptr()
        store.put(torch.full((2, 3), 2.0))
        assert store.get().data_ptr() == place and (store.get() == 2).all()

    def test_corrections_hold_for_the_grid_they_were_made_for(self, ddpm: LoadedPipeline) -> None:
        schedule = schedule_for(ddpm, (0, 5))
        channels = int(schedule.cuts[0].channels or 0)
        neutral = {"scale.up1": torch.ones(STEPS, channels), "shift.up1": torch.zeros(STEPS, channels)}
        wrong = {**neutral, "shift.up1": torch.ones(STEPS, channels)}
        plain, same_again, shifted = (self.sampled(ddpm, schedule, tables, STEPS) for tables in ({}, neutral, wrong))
        torch.testing.assert_close(plain, same_again, atol=1e-6, rtol=1e-6)
        assert (shifted - plain).norm() > 0.01 * plain.norm()
        with pytest.warns(UserWarning, match="another sampler"):
            assert torch.equal(self.sampled(ddpm, schedule, {}, 12), self.sampled(ddpm, schedule, wrong, 12))

    @staticmethod
    def sampled(loaded: LoadedPipeline, schedule: Schedule, tables: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
        with Cache(loaded.pipeline, "unet", FromSchedule(schedule), corrections=tables):
            return run(loaded, steps=steps)


class TestFallingOpen:
    """A loop by hand in which something changes at call 4 of a schedule that computes calls 0 and 5 in full."""

    @staticmethod
    def sample(loaded: LoadedPipeline, change: Callable[[int, dict[str, Any]], dict[str, Any]], **options: Any) -> tuple[list[str], Any]:
        unet, scheduler = loaded.denoiser, loaded.pipeline.scheduler
        rng = torch.Generator().manual_seed(2)
        call: dict[str, Any] = {
            "sample": torch.randn(2, 4, 8, 8, generator=rng),
            "encoder_hidden_states": torch.randn(2, 4, unet.config.cross_attention_dim, generator=rng),
        }
        with torch.no_grad(), qdm_cli.cached(loaded.pipeline, interval=5, **options) as cache, watched(unet) as seen:
            scheduler.set_timesteps(STEPS)
            for index, t in enumerate(scheduler.timesteps):
                call = change(index, dict(call))
                noise = unet(timestep=t, **call).sample
                call["sample"] = scheduler.step(noise, t, call["sample"]).prev_sample
            return seen, cache.summary()["fell_open"]

    @pytest.mark.parametrize(
        ("what", "change"),
        [
            ("shape", lambda call: {name: value[:1] for name, value in call.items()}),
            ("shape", lambda call: {**call, "sample": torch.zeros(2, 4, 16, 16)}),
            ("prompt", lambda call: {**call, "encoder_hidden_states": call["encoder_hidden_states"] * 1.01}),
            ("prompt", lambda call: {**call, "cross_attention_kwargs": {"scale": 0.5}}),
        ],
        ids=["batch", "resolution", "prompt", "adapter scale"],
    )
    def test_a_change_is_computed_in_full_and_said_once(self, sd: LoadedPipeline, what: str, change: Callable[..., Any]) -> None:
        with pytest.warns(UserWarning, match=f"computed in full: .*{what}.* changed"):
            seen, reasons = self.sample(sd, lambda index, call: change(call) if index == 3 else call)
        assert full_calls(seen) == [0, 3, 5]
        assert list(reasons.values()) == [1]

    def test_another_type(self) -> None:
        loaded = load_pipeline(ModelSpec(id="tiny:sd"), spec_of())

        def to_double(index: int, call: dict[str, Any]) -> dict[str, Any]:
            if index == 3:
                loaded.denoiser.double()
                return {name: value.double() for name, value in call.items()}
            return call

        with pytest.warns(UserWarning, match="dtype changed"):
            seen, _ = self.sample(loaded, to_double)
        assert full_calls(seen) == [0, 3, 5]

    def test_conditions_made_anew_are_no_change(self, sd: LoadedPipeline) -> None:
        seen, reasons = self.sample(sd, lambda index, call: {**call, "encoder_hidden_states": call["encoder_hidden_states"].clone()})
        assert full_calls(seen) == [0, 5] and reasons == {}

    def test_control_residuals_may_change_at_every_step(self, sd: LoadedPipeline) -> None:
        """They are no condition of the kept tensor: full calls take all of them, partial ones those of the layers that run."""
        unet = sd.denoiser
        shapes: list[torch.Size] = []
        hooks = [block.register_forward_hook(lambda m, a, o: shapes.extend(s.shape for s in o[1])) for block in unet.down_blocks]
        hooks.append(unet.mid_block.register_forward_hook(lambda m, a, o: shapes.append(o.shape)))
        first = unet.conv_in.register_forward_hook(lambda m, a, o: shapes.append(o.shape))
        with torch.no_grad():
            unet(torch.zeros(2, 4, 8, 8), 1, torch.zeros(2, 4, unet.config.cross_attention_dim))
        for hook in (*hooks, first):
            hook.remove()

        def controlled(index: int, call: dict[str, Any]) -> dict[str, Any]:
            rng = torch.Generator().manual_seed(index)
            *skips, middle = [torch.randn(shape, generator=rng) for shape in shapes]
            return {**call, "down_block_additional_residuals": tuple(skips), "mid_block_additional_residual": middle}

        seen, reasons = self.sample(sd, controlled)
        assert full_calls(seen) == [0, 5] and reasons == {}

    def test_same_compares_leaves(self) -> None:
        one = {"a": [torch.ones(2), 3], "b": None}
        assert same(one, {"a": [torch.ones(2), 3], "b": None})
        assert not same(one, {"a": [torch.zeros(2), 3], "b": None})
        assert not same(one, {"a": [torch.ones(2), 3]}) and not same(one, {"a": [torch.ones(2)], "b": None})


class TestSwitching:
    def test_nothing_is_left_behind(self, ddpm: LoadedPipeline) -> None:
        before = run(ddpm)
        scheduler = ddpm.pipeline.scheduler
        cache = qdm_cli.cached(ddpm.pipeline, interval=5)
        assert cache.enable() is cache and cache.enable() is cache
        assert qdm_cli.cached(ddpm.pipeline) is cache
        assert not torch.equal(run(ddpm), before)
        cache.disable()
        cache.disable()
        assert "forward" not in vars(ddpm.denoiser) and not {"step", "set_timesteps"} & vars(scheduler).keys()
        assert torch.equal(run(ddpm), before)

    def test_a_block_inside_a_persistent_cache_leaves_it_on(self, ddpm: LoadedPipeline) -> None:
        cache = qdm_cli.cached(ddpm.pipeline, interval=5).enable()
        with qdm_cli.cached(ddpm.pipeline) as inner:
            assert inner is cache
        assert qdm_cli.cached(ddpm.pipeline) is cache
        cache.disable()
        with pytest.raises(InputError, match="no cache is switched on"):
            qdm_cli.cached(ddpm.pipeline)

    def test_a_denoiser_that_is_patched_already(self, ddpm: LoadedPipeline) -> None:
        with qdm_cli.cached(ddpm.pipeline, interval=5), pytest.raises(InputError, match="already; disable that one first"):
            qdm_cli.cached(ddpm.pipeline, interval=2).enable()
        ddpm.denoiser.forward = lambda *args, **kwargs: None
        try:
            with pytest.raises(InputError, match="replaced by something else"):
                qdm_cli.cached(ddpm.pipeline, interval=2).enable()
        finally:
            del ddpm.denoiser.forward

    def test_a_denoiser_that_is_compiled_as_a_whole(self) -> None:
        loaded = load_pipeline(ModelSpec(id="tiny:ddpm"), spec_of())
        loaded.denoiser.compile()
        with pytest.raises(InputError, match="compiled as a whole"):
            qdm_cli.cached(loaded.pipeline, interval=2).enable()

    def test_an_exception_in_the_middle(self, ddpm: LoadedPipeline) -> None:
        """The next image is right, and so is a call by hand after the broken trajectory."""
        with torch.no_grad():
            size = ddpm.denoiser.config.sample_size
            args = (torch.zeros(1, ddpm.denoiser.config.in_channels, size, size), torch.tensor(7))
            plain = ddpm.denoiser(*args).sample
        with qdm_cli.cached(ddpm.pipeline, interval=5) as cache:
            wanted = run(ddpm)
            count = iter(range(STEPS))

            def fail(*_: Any) -> None:
                if next(count) == 3:
                    raise ZeroDivisionError

            handle = ddpm.denoiser.conv_in.register_forward_hook(fail)
            with pytest.raises(ZeroDivisionError):
                run(ddpm)
            handle.remove()
            assert cache.summary()["tensors"] == 0
            with torch.no_grad():
                assert torch.equal(ddpm.denoiser(*args).sample, plain)
            assert torch.equal(run(ddpm), wanted)

    def test_calls_by_hand_are_full(self, ddpm: LoadedPipeline) -> None:
        size, channels = ddpm.denoiser.config.sample_size, ddpm.denoiser.config.in_channels
        x = torch.randn(1, channels, size, size, generator=torch.Generator().manual_seed(1))
        with torch.no_grad(), qdm_cli.cached(ddpm.pipeline, interval=5) as cache:
            run(ddpm)
            with watched(ddpm.denoiser) as seen:
                ddpm.denoiser(x, 3)
                ddpm.denoiser(x, timestep=3)
        assert seen == ["full", "full"] and cache.summary()["outside"] == 2

    def test_another_scheduler_is_followed(self, sd: LoadedPipeline) -> None:
        loaded = with_scheduler(sd, DDIM)
        with qdm_cli.cached(loaded.pipeline, interval=3) as cache:
            first = loaded.pipeline.scheduler
            loaded.pipeline.scheduler = schedulers.EulerDiscreteScheduler.from_config(first.config)
            with watched(sd.denoiser) as seen:
                run(loaded, scheduler="EulerDiscreteScheduler", guidance=1.0)
            assert "step" not in vars(first)
        assert full_calls(seen) == [0, 3, 6, 9] and cache.summary()["fell_open"] == {}

    @pytest.mark.parametrize("named", [True, False], ids=["functools.wraps", "bare"])
    def test_a_scheduler_that_was_wrapped_for_a_while_is_followed(self, sd: LoadedPipeline, named: bool) -> None:
        """The wrapper lies below the clock's method at first, and takes it off together with itself."""
        loaded = with_scheduler(sd, DDIM)
        euler = {"scheduler": "EulerDiscreteScheduler", "guidance": 1.0}
        with qdm_cli.cached(loaded.pipeline, interval=3) as cache:
            second = schedulers.EulerDiscreteScheduler.from_config(loaded.pipeline.scheduler.config)
            loaded.pipeline.scheduler = second
            for _ in range(3):
                inner, before = second.step, vars(second).get("step")

                def step(*args: Any, inner: Any = inner, **kwargs: Any) -> Any:
                    return inner(*args, **kwargs)

                second.step = wraps(inner)(step) if named else step
                for wrapped in (True, False):
                    if not wrapped:
                        del second.step
                        if before is not None:
                            second.step = before
                    with watched(sd.denoiser) as seen:
                        run(loaded, **euler)
                    assert full_calls(seen) == [0, 3, 6, 9]
            assert cache.summary()["fell_open"] == {} and cache.summary()["trajectories"] == 6
            layers, method = 0, second.step
            while (method := getattr(method, "__wrapped__", None)) is not None:
                layers += 1
            assert layers <= 1
        assert not {"step", "set_timesteps"} & vars(second).keys()

    def test_a_wrapper_that_outlives_the_cache_does_no_more_than_call(self, sd: LoadedPipeline) -> None:
        loaded = with_scheduler(sd, DDIM)
        scheduler, calls = loaded.pipeline.scheduler, []
        with qdm_cli.cached(loaded.pipeline, interval=3) as cache:
            inner = scheduler.step
            scheduler.step = lambda *args, **kwargs: calls.append(1) or inner(*args, **kwargs)
            for _ in range(2):
                with watched(sd.denoiser) as seen:
                    run(loaded, guidance=1.0)
                assert full_calls(seen) == [0, 3, 6, 9]
        with watched(sd.denoiser) as seen:
            run(loaded, guidance=1.0)
        assert seen == ["full"] * STEPS and len(calls) == 3 * STEPS and cache.summary()["trajectories"] == 2

    def test_replaced_layers_are_seen(self) -> None:
        """Adapters replace layers: the halves are cut anew at the next trajectory."""
        loaded = load_pipeline(ModelSpec(id="tiny:ddpm"), spec_of())
        with qdm_cli.cached(loaded.pipeline, interval=5):
            run(loaded)
            seen: list[int] = []

            class Adapter(nn.Module):
                def __init__(self, layer: nn.Module):
                    super().__init__()
                    self.layer = layer

                def forward(self, x: torch.Tensor) -> torch.Tensor:
                    seen.append(1)
                    return self.layer(x)

            loaded.denoiser.conv_in = Adapter(loaded.denoiser.conv_in)
            run(loaded)
        assert len(seen) == STEPS

    @pytest.mark.parametrize("hook_first", [True, False])
    def test_offload_hooks_move_weights_before_every_call(self, ddpm: LoadedPipeline, hook_first: bool) -> None:
        moved: list[int] = []

        class Move(ModelHook):
            def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
                moved.append(1)
                return args, kwargs

        with qdm_cli.cached(ddpm.pipeline, interval=5):
            wanted = run(ddpm)
        cache = qdm_cli.cached(ddpm.pipeline, interval=5)
        steps = [lambda: add_hook_to_module(ddpm.denoiser, Move()), cache.enable]
        for step in steps if hook_first else steps[::-1]:
            step()
        assert torch.equal(run(ddpm), wanted)
        assert len(moved) == STEPS and cache.summary()["partial"] == 8
        cache.disable()
        with watched(ddpm.denoiser) as seen:
            run(ddpm)
        remove_hook_from_module(ddpm.denoiser)
        assert set(seen) == {"full"} and len(moved) == 2 * STEPS


class TestGrids:
    def test_other_steps_are_resampled_with_a_warning(self, ddpm: LoadedPipeline) -> None:
        schedule = schedule_for(ddpm, (0, 5))
        said = pytest.warns(UserWarning, match="10 steps and 10 calls, here 20 and 20")
        with qdm_cli.cached(ddpm.pipeline, schedule), said, watched(ddpm.denoiser) as seen:
            run(ddpm, steps=20)
        assert full_calls(seen)[0] == 0 and abs(full_calls(seen)[1] - 10) <= 1 and len(full_calls(seen)) == 2
        with warnings.catch_warnings(), qdm_cli.cached(ddpm.pipeline, schedule):
            warnings.simplefilter("error")
            run(ddpm)

    def test_or_refused(self, ddpm: LoadedPipeline) -> None:
        with qdm_cli.cached(ddpm.pipeline, schedule_for(ddpm, (0, 5)), resample=False):
            with pytest.raises(InputError, match="made for another sampler: 10 steps"):
                run(ddpm, steps=20)
            run(ddpm)

    def test_another_model(self, ddpm: LoadedPipeline, sd: LoadedPipeline) -> None:
        with pytest.raises(InputError, match="made for another model: class UNet2DModel, not UNet2DConditionModel"):
            qdm_cli.cached(sd.pipeline, schedule_for(ddpm, (0, 5)))

    def test_few_steps_are_not_cached_unless_forced(self, ddpm: LoadedPipeline) -> None:
        plain = run(ddpm, steps=8)
        with qdm_cli.cached(ddpm.pipeline, interval=2) as cache, pytest.warns(UserWarning, match="8 steps are too few to cache"):
            assert torch.equal(run(ddpm, steps=8), plain)
        assert cache.summary()["partial"] == 0
        with qdm_cli.cached(ddpm.pipeline, interval=2, force=True) as cache:
            run(ddpm, steps=8)
        assert cache.summary()["partial"] == 4

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"interval": 2, "cut": 99}, "skip branches 1 to"),
            ({"interval": 2, "cut": (0, 1)}, "no block cut"),
            ({"schedule": "nowhere.json"}, "no schedule can be read there"),
            ({"schedule": "nowhere.json", "interval": 2}, "and not both"),
        ],
        ids=["branch", "blocks", "file", "both"],
    )
    def test_bad_arguments(self, ddpm: LoadedPipeline, options: dict[str, Any], message: str) -> None:
        with pytest.raises(InputError, match=message):
            qdm_cli.cached(ddpm.pipeline, **options)

    def test_an_interval_longer_than_the_trajectory(self, ddpm: LoadedPipeline) -> None:
        with qdm_cli.cached(ddpm.pipeline, interval=11), pytest.raises(InputError, match=r"interval must lie in 1\.\.10"):
            run(ddpm)


class TestControlNet:
    @pytest.fixture
    def drawn(self, sd: LoadedPipeline) -> Callable[..., torch.Tensor]:
        """Last latent of a ControlNet pipeline; `counted` holds the samples of each ControlNet call that was computed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            control = ControlNetModel.from_unet(sd.denoiser, conditioning_embedding_out_channels=(8, 8)).eval()
            for parameter in control.parameters():
                torch.nn.init.normal_(parameter, std=0.05)  # zero layers would answer nothing
        known = {name: part for name, part in sd.pipeline.components.items() if name not in ("image_encoder",)}
        pipeline = StableDiffusionControlNetPipeline(**known, controlnet=control)
        pipeline.set_progress_bar_config(disable=True)
        size = sd.denoiser.config.sample_size * pipeline.vae_scale_factor
        picture = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(6))

        def draw(**more: Any) -> torch.Tensor:
            arguments = {"prompt": "a dog", "image": picture, "num_inference_steps": STEPS, "output_type": "latent", **more}
            return pipeline(**arguments, generator=torch.Generator().manual_seed(1)).images

        draw.pipeline = pipeline  # type: ignore[attr-defined]
        draw.counted = []  # type: ignore[attr-defined]
        control.conv_in.register_forward_hook(lambda module, args, output: draw.counted.append(len(args[0])))  # type: ignore[attr-defined]
        return draw

    @pytest.mark.parametrize(("controlnet", "computed"), [("recompute", STEPS), ("reuse", 4)])
    def test_residuals_are_reused_where_the_denoiser_reuses(self, drawn: Any, controlnet: Any, computed: int) -> None:
        plain = drawn()
        drawn.counted.clear()
        with qdm_cli.cached(drawn.pipeline, interval=3, cut=2, controlnet=controlnet) as cache:
            first = drawn()
            assert len(drawn.counted) == computed
            assert torch.equal(drawn(), first) and len(drawn.counted) == 2 * computed
            assert cache.summary()["fell_open"] == {} and not torch.equal(first, plain)
        assert "forward" not in vars(drawn.pipeline.controlnet)
        assert torch.equal(drawn(), plain)

    def test_interval_1_changes_nothing(self, drawn: Any) -> None:
        plain = drawn()
        with qdm_cli.cached(drawn.pipeline, interval=1, controlnet="reuse"):
            assert torch.equal(drawn(), plain)

    def test_a_strength_that_changes_on_the_way_is_computed(self, drawn: Any) -> None:
        """The ControlNet's influence ends in the middle: its call there has another strength than the kept one."""
        with qdm_cli.cached(drawn.pipeline, interval=5, controlnet="reuse"):
            drawn(control_guidance_end=0.3)
        assert len(drawn.counted) == 3

    def test_other_words(self, drawn: Any) -> None:
        with pytest.raises(InputError, match="controlnet must be recompute or reuse"):
            qdm_cli.cached(drawn.pipeline, interval=3, controlnet="keep")
