"""CUDA graphs along a cache schedule: the same bits as the schedule without graphs, one graph per function and kind of call.

On the CPU a graph is a recorded call (`conftest.py`); what a GPU adds, capture itself, is in the tests marked `gpu`.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMPipeline, DDIMScheduler
from torch import nn

import qdm_cli
from qdm_cli.engine.caching.runtime import Cache, find_cut
from qdm_cli.engine.caching.runtime.follow import FromSchedule
from qdm_cli.engine.caching.runtime.halves import Lent
from qdm_cli.engine.caching.schedule import Action, ModelRef, Schedule, hash_config, make_actions, schedule_from_refreshes, write_schedule
from qdm_cli.engine.caching.trace import trace_sampler
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec
from qdm_cli.engine.runtime import graphs
from qdm_cli.engine.runtime.folder import compact, packed_tensors, write_component, write_pipeline
from qdm_cli.engine.runtime.graphs import Graphs
from qdm_cli.engine.runtime.loading import graphed
from qdm_cli.engine.runtime.modules import pack_denoiser_

STEPS = 10
SPEC = SamplerSpec(scheduler="DDIMScheduler", steps=STEPS, guidance=3.0)


def packed(name: str, make_state: Any, device: str = "cpu", mode: str = "auto") -> LoadedPipeline:
    """A tiny pipeline on packed layers with scales per step, as exports have them."""
    loaded = load_pipeline(ModelSpec(id=f"tiny:{name}"), SPEC)
    loaded.denoiser.eval().requires_grad_(False)
    keys = [900.0, 700.0, 500.0, 300.0, 100.0]
    pack_denoiser_(loaded.denoiser, make_state(loaded.denoiser, keys=keys, act_mode="static", timestep_aware=True), mode)
    loaded.pipeline.to(device)
    return loaded


@pytest.fixture
def sd(captures: list[int], make_state: Any) -> LoadedPipeline:
    return packed("sd", make_state)


def schedule_for(
    loaded: LoadedPipeline, refreshes: tuple[int, ...] = (0, 3, 6), of_segment: tuple[int, ...] = (1, 1, 1), spec: SamplerSpec = SPEC
) -> Schedule:
    reference, guidance = trace_sampler(loaded, spec)
    model = ModelRef(class_=type(loaded.denoiser).__name__, config_sha256=hash_config(loaded.denoiser.config))
    cuts = [find_cut(loaded.denoiser, m) for m in sorted(set(of_segment))]
    names = [f"up{m}" for m in of_segment]
    return schedule_from_refreshes(refreshes, cuts=cuts, model=model, sampler=reference, guidance=guidance, of_segment=names)


def with_actions(schedule: Schedule, actions: tuple[Action, ...]) -> Schedule:
    return schedule.model_copy(update={"actions": actions})


def in_int8(schedule: Schedule) -> Schedule:
    return schedule.model_copy(update={"cuts": tuple(cut.model_copy(update={"store_dtype": "int8"}) for cut in schedule.cuts)})


def tables_of(schedule: Schedule) -> dict[str, torch.Tensor]:
    """Corrections that differ from call to call."""
    rng, found = torch.Generator().manual_seed(5), {}
    for cut in schedule.cuts:
        shape = (STEPS, int(cut.channels or 0))
        found[f"scale.{cut.id}"] = 1 + 0.1 * torch.rand(shape, generator=rng)
        found[f"shift.{cut.id}"] = 0.1 * torch.rand(shape, generator=rng)
    return found


def cache_of(loaded: LoadedPipeline, schedule: Schedule, corrections: Any = None) -> Cache:
    return Cache(loaded.pipeline, loaded.component, FromSchedule(schedule), corrections=corrections)


def run(loaded: LoadedPipeline, count: int = 1, start: int = 0) -> torch.Tensor:
    return generate(loaded, SPEC, count=count, batch=count, start=start, output="latent")


SCHEDULES: dict[str, tuple[Callable[[LoadedPipeline], Schedule], bool, int]] = {
    # how it is made, with corrections, graphs: a full and a partial one for every cut, and the whole where nothing reuses a full call
    "one cut": (lambda loaded: schedule_for(loaded), False, 2),
    "two cuts": (lambda loaded: schedule_for(loaded, of_segment=(1, 2, 1)), False, 4),
    "corrections": (lambda loaded: schedule_for(loaded, of_segment=(2, 1, 2)), True, 4),
    "full calls in a row": (lambda loaded: schedule_for(loaded, (0, 1, 2, 6), (1, 1, 1, 1)), False, 3),
    "int8": (lambda loaded: in_int8(schedule_for(loaded)), True, 2),
    "linear": (lambda loaded: with_actions(schedule_for(loaded), make_actions((0, 3, 6), STEPS, "up1", order=1)), False, 2),
}


@pytest.mark.parametrize(("make", "corrected", "functions"), SCHEDULES.values(), ids=SCHEDULES)
def test_the_bits_are_those_of_the_schedule_alone(
    sd: LoadedPipeline, captures: list[int], make: Callable[[LoadedPipeline], Schedule], corrected: bool, functions: int
) -> None:
    schedule = make(sd)
    tables = tables_of(schedule) if corrected else None
    with cache_of(sd, schedule, tables):
        wanted = [run(sd, start=start) for start in (0, 1)]
    assert not torch.equal(wanted[0], run(sd))
    with cache_of(sd, schedule, tables) as cache:
        replayed = Graphs(sd.denoiser).enable()
        got = [run(sd, start=start) for start in (0, 1)]
        assert [(call, kind) for call, _, kind in cache.taken] == [(action.call, action.action) for action in schedule.actions]
        assert cache.summary()["fell_open"] == {}
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
    assert len(captures) == functions, "the second image needs none"
    replayed.disable()


def test_scales_of_steps_are_read_in_the_graph(sd: LoadedPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hook that finds the row of a step is part of what is replayed: outside of a graph it does not run again."""
    from qdm_cli.engine.diffusion.step_context import StepContext

    with cache_of(sd, schedule_for(sd)):
        wanted = run(sd)
        Graphs(sd.denoiser).enable()
        run(sd)
        inside: list[int] = []
        find = StepContext.set_timestep
        monkeypatch.setattr(StepContext, "set_timestep", lambda self, timestep: (inside.append(1), find(self, timestep))[1])
        assert torch.equal(run(sd), wanted)
        assert len(inside) == STEPS, "the stand-in runs a graph again, hook and all; a hook outside would make it twice as many"


def test_batches_and_sequential_guidance_have_kinds_and_branches_of_their_own(sd: LoadedPipeline, captures: list[int]) -> None:
    """Two guidance branches share graphs, not the kept tensor, although a full call of the second overwrites what the first gave."""
    rng = torch.Generator().manual_seed(2)
    unet, scheduler = sd.denoiser, sd.pipeline.scheduler
    prompts = [torch.randn(1, 4, unet.config.cross_attention_dim, generator=rng) for _ in range(2)]
    start = torch.randn(1, 4, 8, 8, generator=rng)

    @torch.no_grad()
    def sample() -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        x = start
        for t in scheduler.timesteps:
            one, two = (unet(x, t, encoder_hidden_states=prompt).sample for prompt in prompts)
            x = scheduler.step(one + 3.0 * (two - one), t, x).prev_sample
        return x

    with qdm_cli.cached(sd.pipeline, interval=4) as cache:
        wanted = [sample(), run(sd, 2)]
        Graphs(unet).enable()
        assert torch.equal(sample(), wanted[0]) and len(captures) == 2
        assert cache.summary()["tensors"] == 2 and cache.summary()["fell_open"] == {}
        assert torch.equal(run(sd, 2), wanted[1]) and len(captures) == 4
        assert torch.equal(sample(), wanted[0]) and len(captures) == 4


def test_a_kept_tensor_stays_at_its_place(sd: LoadedPipeline) -> None:
    with cache_of(sd, schedule_for(sd)) as cache:
        Graphs(sd.denoiser).enable()
        places = set()
        for _ in range(2):
            run(sd)
            places.add(cache._kept[0].store.get().data_ptr())
        assert len(places) == 1


def test_the_schedule_may_come_after_the_graphs(sd: LoadedPipeline, captures: list[int]) -> None:
    """And go again: its graphs go with it, those of the model alone stay."""
    schedule, plain = schedule_for(sd), run(sd)
    with cache_of(sd, schedule):
        wanted = run(sd)
    replayed = Graphs(sd.denoiser).enable()
    assert torch.equal(run(sd), plain) and len(replayed) == 1
    for _ in range(2):
        with cache_of(sd, schedule) as cache:
            assert torch.equal(run(sd), wanted) and len(replayed) == 3
            assert cache.runner is replayed
        assert cache.runner is None and len(replayed) == 1
        assert torch.equal(run(sd), plain)
    assert len(captures) == 5


def test_disabling_frees_all_and_leaves_the_schedule(sd: LoadedPipeline, captures: list[int]) -> None:
    with cache_of(sd, schedule_for(sd)) as cache:
        wanted = run(sd)
        replayed = Graphs(sd.denoiser).enable()
        run(sd)
        held = [weakref.ref(tensor) for capture in replayed._captures.values() for tensor in capture.inputs]
        assert len(held) > 4
        replayed.disable()
        assert len(replayed) == 0 and cache.runner is None and not any(ref() is not None for ref in held)
        assert torch.equal(run(sd), wanted) and len(captures) == 2
        assert cache.summary()["fell_open"] == {}


def test_old_graphs_go(sd: LoadedPipeline, captures: list[int]) -> None:
    """`limit` counts shapes: with one cut three functions may hold one graph each."""
    with cache_of(sd, schedule_for(sd)):
        wanted = {count: run(sd, count) for count in (1, 2, 3)}
        replayed = Graphs(sd.denoiser, limit=1).enable()
        for count in (1, 2, 3, 1):
            assert torch.equal(run(sd, count), wanted[count])
            assert len(replayed) <= 3
    assert len(captures) == 8


@pytest.mark.parametrize("refused", ["full", "partial"])
def test_a_half_that_cannot_be_captured_runs_without_a_graph(
    sd: LoadedPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, refused: str
) -> None:
    capture = graphs.record

    def some(call: Callable[[], Any], pool: Any) -> Any:
        if (refused == "full") == any(isinstance(part, Lent) for part in call()):
            raise RuntimeError("operation not permitted when stream is capturing")
        return capture(call, pool)

    with cache_of(sd, schedule_for(sd)) as cache:
        wanted = run(sd)
        monkeypatch.setattr(graphs, "record", some)
        replayed = Graphs(sd.denoiser).enable()
        assert torch.equal(run(sd), wanted) and torch.equal(run(sd), wanted)
        assert caplog.text.count("cannot be captured") == 1 and len(replayed) == 1
        assert cache.summary()["fell_open"] == {}


def test_a_changed_prompt_falls_open_and_is_right(sd: LoadedPipeline) -> None:
    unet, scheduler = sd.denoiser, sd.pipeline.scheduler
    rng = torch.Generator().manual_seed(2)
    x, words = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 4, unet.config.cross_attention_dim, generator=rng)

    @torch.no_grad()
    def sample(cache: Cache) -> torch.Tensor:
        scheduler.set_timesteps(STEPS)
        value = x
        for index, t in enumerate(scheduler.timesteps):
            said = words if index < 4 else 1.01 * words
            value = scheduler.step(unet(value, t, encoder_hidden_states=said).sample, t, value).prev_sample
        assert cache.summary()["fell_open"]
        return value

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with qdm_cli.cached(sd.pipeline, interval=5) as cache:
            wanted = sample(cache)
            Graphs(unet).enable()
            assert torch.equal(sample(cache), wanted)


def test_calls_outside_of_a_trajectory_are_replayed_whole(sd: LoadedPipeline, captures: list[int]) -> None:
    unet = sd.denoiser
    x, words = torch.randn(1, 4, 8, 8), torch.randn(1, 4, unet.config.cross_attention_dim)
    with torch.no_grad():
        plain = [unet(x, step, encoder_hidden_states=words).sample for step in (700, 100)]
        with qdm_cli.cached(sd.pipeline, interval=5) as cache:
            Graphs(unet).enable()
            got = [unet(x, step, encoder_hidden_states=words).sample for step in (700, 100)]
        assert all(torch.equal(one, other) for one, other in zip(got, plain, strict=True))
    assert len(captures) == 1 and cache.summary()["outside"] == 2


def test_replaced_layers_are_captured_anew(sd: LoadedPipeline, captures: list[int]) -> None:
    """Adapters replace layers; graphs of the layers before are dropped at the next trajectory."""

    class Halved(nn.Module):
        def __init__(self, layer: nn.Module):
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) / 2

    with cache_of(sd, schedule_for(sd)):
        replayed = Graphs(sd.denoiser).enable()
        before = run(sd)
        sd.denoiser.conv_norm_out = Halved(sd.denoiser.conv_norm_out)
        after = run(sd)
        assert not torch.equal(before, after) and len(captures) == 4 and len(replayed) == 2
        replayed.disable()
        assert torch.equal(run(sd), after)


def test_transformers(captures: list[int], make_state: Any) -> None:
    loaded = packed("dit", make_state)
    with qdm_cli.cached(loaded.pipeline, interval=2):
        wanted = run(loaded)
        Graphs(loaded.denoiser).enable()
        assert torch.equal(run(loaded), wanted) and len(captures) == 2


def test_refusals(sd: LoadedPipeline) -> None:
    with (
        qdm_cli.cached(sd.pipeline, interval=3, compile={"backend": "eager"}),
        pytest.raises(InputError, match="follows a cache whose functions are compiled"),
    ):
        graphed(sd.pipeline)
    graphed(sd.pipeline)
    with pytest.raises(InputError, match="halves cannot be compiled as well"):
        qdm_cli.cached(sd.pipeline, interval=3, compile={"backend": "eager"}).enable()
    sd.denoiser._compiled_call_impl.disable()
    for first in (True, False):
        cache = qdm_cli.cached(sd.pipeline, interval=3)
        if first:
            cache.enable()
        add_hook_to_module(sd.denoiser, ModelHook())
        if not first:
            cache.enable()
        with pytest.raises(InputError, match="forward is replaced"):
            graphed(sd.pipeline)
        cache.disable()


def test_a_folder_with_a_schedule_is_loaded_with_graphs(tmp_path: Path, tiny_unet: Any, make_state: Any, captures: list[int]) -> None:
    pipeline = DDIMPipeline(unet=tiny_unet, scheduler=DDIMScheduler())
    folder = tmp_path / "export"
    write_pipeline(folder, pipeline, "unet", None)
    state = make_state(tiny_unet, act_mode="static", timestep_aware=True)
    tensors, config = packed_tensors(tiny_unet, state)
    write_component(folder / "unet", tiny_unet, {name: compact(name, value) for name, value in tensors.items()}, config)

    def image(**options: Any) -> torch.Tensor:
        opened = qdm_cli.load(folder, **({"graphs": False} | options))
        opened.set_progress_bar_config(disable=True)
        noise = torch.Generator().manual_seed(0)
        return torch.as_tensor(opened(num_inference_steps=STEPS, generator=noise, output_type="np").images)

    uncached = image()
    opened = qdm_cli.load(folder, graphs=False)
    loaded = LoadedPipeline(**{**vars(load_pipeline(ModelSpec(id="tiny:ddpm"), SPEC)), "pipeline": opened, "denoiser": opened.unet})
    write_schedule(folder, schedule_for(loaded, spec=SPEC.model_copy(update={"guidance": None})))
    wanted = image()
    assert not captures and not torch.equal(wanted, uncached)
    assert torch.equal(image(graphs=True, device="cpu"), wanted) and len(captures) == 2
    assert torch.equal(image(graphs=None), wanted) and len(captures) == 4  # the CPU counts as a GPU here
    assert torch.equal(image(graphs=True, device="cpu", cache=False), uncached)


@pytest.mark.gpu
class TestOnAGpu:
    """Capture itself: the same bits as the same schedule without graphs."""

    @pytest.mark.parametrize(("make", "corrected", "functions"), SCHEDULES.values(), ids=SCHEDULES)
    def test_the_bits_are_those_of_the_schedule_alone(
        self, make_state: Any, make: Callable[[LoadedPipeline], Schedule], corrected: bool, functions: int
    ) -> None:
        loaded = packed("sd", make_state, "cuda", "exact")
        schedule = make(loaded)
        tables = tables_of(schedule) if corrected else None
        with cache_of(loaded, schedule, tables) as cache:
            wanted = [run(loaded, count, start) for count, start in ((1, 0), (1, 1), (2, 0), (1, 0))]
            replayed = Graphs(loaded.denoiser).enable()
            got = [run(loaded, count, start) for count, start in ((1, 0), (1, 1), (2, 0), (1, 0))]
            assert len(replayed) == 2 * functions and cache.summary()["fell_open"] == {}
            replayed.disable()
            again = run(loaded)
        assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
        assert torch.equal(again, wanted[0])

    def test_memory_is_given_back(self, make_state: Any) -> None:
        def held() -> int:
            gc.collect()
            torch.cuda.synchronize()
            torch._C._cuda_clearCublasWorkspaces()  # one for every stream that a product ran on
            return torch.cuda.memory_allocated()

        loaded = packed("sd", make_state, "cuda", "exact")
        with cache_of(loaded, schedule_for(loaded)):
            run(loaded)
            before = held()
            replayed = Graphs(loaded.denoiser).enable()
            run(loaded)
            during = held()
            replayed.disable()
            assert during > held() and held() <= before + 2**16
