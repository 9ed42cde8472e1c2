"""`cache.align`: where full calls may be under samplers that call the denoiser more than once per step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import schedulers

import qdm_cli
from qdm_cli import main as cli
from qdm_cli.engine.caching import dp
from qdm_cli.engine.caching.config import DpConfig
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.planner import Subject, planned, problem_of
from qdm_cli.engine.caching.runtime import find_cut
from qdm_cli.engine.caching.schedule import ModelRef, SamplerRef, Schedule, hash_config, read_schedule
from qdm_cli.engine.caching.trace import sampler_at, trace_sampler
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.models import LoadedPipeline, load_pipeline
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

STEPS = 10
LATENCY = Latency(10.0, {"up1": 1.0}, 1)
SECOND = {"HeunDiscreteScheduler": 7, "PNDMScheduler": 5}
"""Scheduler -> a call that is not the first of its step: the second of Heun's fourth step, the second of PNDM's second step."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def sampler_of(scheduler: str) -> SamplerRef:
    made = getattr(schedulers, scheduler)(beta_schedule="scaled_linear")
    made.set_timesteps(STEPS)
    return sampler_at(made, made.timesteps.tolist(), STEPS)


def errors_with_a_change_at(call: int, sampler: SamplerRef, longest: int = 6) -> np.ndarray:
    """[1, n, W] little drift, but nothing kept before `call` serves from there on."""
    starts, lags = np.arange(sampler.calls)[:, None], np.arange(longest)
    return (0.01 * lags + np.where((starts < call) & (starts + lags >= call), 10.0, 0.0))[None]


def spec_of(align: str) -> DpConfig:
    return DpConfig.model_validate({"align": align, "objective": "sum", "cuts": [1]})


def plan_of(align: str, sampler: SamplerRef, subject: Subject, call: int) -> dp.Plan:
    """The best plan that takes at most half of the uncached time."""
    problem = problem_of(spec_of(align), subject, errors_with_a_change_at(call, sampler), np.ones(sampler.calls), LATENCY)
    found = dp.within(problem, sampler.calls * LATENCY.full_ms / 2)
    assert found is not None
    return found


def inner_calls(refreshes: tuple[int, ...], steps: tuple[int, ...]) -> list[int]:
    """Full calls that are not the first of their step; step 0 is full as a whole (`first_full: 1`)."""
    return [call for call in refreshes if steps[call] > 0 and steps[call] == steps[call - 1]]


@pytest.fixture(scope="module")
def sd() -> LoadedPipeline:
    return load_pipeline(ModelSpec(id="tiny:sd"), SamplerSpec(scheduler="DDIMScheduler", steps=STEPS))


def subject_of(sampler: SamplerRef, loaded: LoadedPipeline) -> Subject:
    model = ModelRef(class_=type(loaded.denoiser).__name__, config_sha256=hash_config(loaded.denoiser.config))
    return Subject(model, sampler, trace_sampler(loaded, SamplerSpec(steps=STEPS, guidance=1.0))[1], [find_cut(loaded.denoiser, 1)])


@pytest.mark.parametrize(("scheduler", "call"), SECOND.items(), ids=SECOND)
def test_the_search_refreshes_inside_a_step_only_where_calls_are_aligned(sd: LoadedPipeline, scheduler: str, call: int) -> None:
    sampler = sampler_of(scheduler)
    steps = sampler.step_of_call
    assert steps[call] == steps[call - 1], "not the first call of its step"
    subject = subject_of(sampler, sd)
    free, bound = (plan_of(align, sampler, subject, call) for align in ("call", "step"))
    assert call in free.refreshes and free.cost < 1
    assert not inner_calls(bound.refreshes, steps)
    assert bound.cost >= 10, "one call at least reuses what does not serve it"


@pytest.mark.parametrize(("scheduler", "call"), SECOND.items(), ids=SECOND)
def test_the_pipeline_runs_the_plan_call_by_call(sd: LoadedPipeline, scheduler: str, call: int) -> None:
    """Through `schedule.json` in memory: full calls are the planned ones, nothing falls open, and a second image is the first again."""
    pipeline = type(sd.pipeline)(
        **{**sd.pipeline.components, "scheduler": getattr(schedulers, scheduler).from_config(sd.pipeline.scheduler.config)}
    )
    pipeline.set_progress_bar_config(disable=True)
    loaded = LoadedPipeline(**{**vars(sd), "pipeline": pipeline})
    spec = SamplerSpec(scheduler=scheduler, steps=STEPS, guidance=1.0)
    sampler, _ = trace_sampler(loaded, spec)
    subject = subject_of(sampler, loaded)
    plan = plan_of("call", sampler, subject, call)
    schedule = planned(plan, [plan], spec_of("call"), subject, LATENCY)
    assert call in schedule.refreshes
    images = []
    for _ in range(2):
        with qdm_cli.cached(pipeline, Schedule.model_validate(schedule.model_dump()), resample=False) as cache:
            images.append(generate(loaded, spec, count=1, batch=1, output="latent"))
            taken = [(at, kind) for at, _, kind in cache.taken]
            assert cache.summary()["fell_open"] == {}
        assert taken == [(action.call, action.action) for action in schedule.actions]
    assert torch.equal(*images)


RECIPE = """
version: 1
name: r
model: {{id: "tiny:sd"}}
sampler: {{scheduler: {scheduler}, steps: 10, guidance: 1.0}}
device: {{name: cpu}}
cache:
  method: dp
  cuts: [1]
  objective: sum
  sensitivity: none
  refine: 0
  correction: none
  max_interval: 3
  data: {{samples: 1, batch: 1}}
  verify: {{samples: 1, batch: 1, baseline: none}}
"""


@pytest.mark.parametrize(("scheduler", "call"), SECOND.items(), ids=SECOND)
def test_the_command_plans_and_verifies_such_a_schedule(
    tmp_cwd: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scheduler: str, call: int
) -> None:
    """`qdm cache` with `cache.align=call`; drift and latency are those of the search's test, all else is the command's own."""
    from qdm_cli.engine.stages import cache as stage

    def profiled(spec: Any, models: Any, subject: Subject, ctx: Any) -> np.ndarray:
        (ctx.payload / "profile.safetensors").write_bytes(b"")
        return errors_with_a_change_at(call, subject.sampler)

    monkeypatch.setattr(stage, "profiled", profiled)
    monkeypatch.setattr(stage, "measured_latency", lambda *_: LATENCY)
    (tmp_cwd / "r.yaml").write_text(RECIPE.format(scheduler=scheduler))
    inside = []
    for align in ("call", "step"):
        code = cli.run(["cache", "r.yaml", f"cache.align={align}"])
        said = capfd.readouterr()
        assert code == 0, said.err
        schedule = read_schedule(Path(said.out.strip()))
        assert schedule.verified is not None and schedule.verified.metrics["latent_error"] is not None
        inside.append(inner_calls(schedule.refreshes, schedule.sampler.step_of_call))
    assert call in inside[0] and not inside[1]


def test_planned_from_a_real_profile(tmp_cwd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing replaced: the window of a profile is counted in calls, so that an interval of 3 steps reaches across 6 calls."""
    (tmp_cwd / "r.yaml").write_text(RECIPE.format(scheduler="HeunDiscreteScheduler"))
    assert cli.run(["cache", "r.yaml", "cache.align=call", "cache.budget.speedup=1.05"]) == 0
    schedule = read_schedule(Path(capfd.readouterr().out.strip()))
    assert schedule.sampler.calls == 2 * STEPS - 1
    assert max(np.diff([*schedule.refreshes, schedule.sampler.calls])) <= 6
