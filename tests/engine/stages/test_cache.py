"""The stage `cache`: what it writes for every method, its budgets, and what it refuses."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from qdm_cli.engine.artifact import Artifact, Manifest, hash_file
from qdm_cli.engine.caching import verify
from qdm_cli.engine.caching.drive import following, relative_errors
from qdm_cli.engine.caching.latency import Latency
from qdm_cli.engine.caching.schedule import Schedule, read_schedule
from qdm_cli.engine.context import RunContext, Silent, StageResult
from qdm_cli.engine.errors import GateFailed, InputError
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant.calibration import RangeRule
from qdm_cli.engine.quant.state import STATE_FILE, read_state, write_state
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.stages import cache as stage

MANIFEST = Manifest(schema=1, kind="calibrated", stage="calibrate", key="k", digest="d", files={}, layers=[{"name": "conv_in"}])
STEPS = 10
PLAIN: dict[str, Any] = {"verify": None}
SMALL = {"data": {"samples": 1, "batch": 1}, "rollouts": 2, "max_interval": 4, "cuts": [1, 2], "refine": 2, "correction": "none"}
FEW = {"samples": 1, "batch": 1, "baseline": "none"}


class Bench:
    """A recipe with a section `cache` and a context in a folder."""

    def __init__(
        self,
        root: Path,
        section: dict[str, Any],
        model: str = "tiny:ddpm",
        steps: int = STEPS,
        measured: Path | None = None,
        **sampler: Any,
    ):
        sampler = {"scheduler": "DDIMScheduler", "steps": steps, **sampler}
        self.recipe = Recipe.model_validate({"model": {"id": model}, "sampler": sampler, "cache": section})
        self.ctx = RunContext(self.recipe, root / "cache-12345678.partial")
        self.ctx.payload.mkdir(parents=True, exist_ok=True)
        if measured is not None:
            shutil.copytree(measured, self.ctx.resume)
        self.ctx.resume.mkdir(exist_ok=True)

    def run(self, source: Artifact | None = None) -> StageResult:
        return stage.cache(self.recipe.cache, source, self.ctx)

    @property
    def schedule(self) -> Schedule:
        return read_schedule(self.ctx.payload)


@pytest.fixture
def fixed_latency(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times that no other process disturbs: a full call 10 ms, partial calls 1, 4, 7 ms."""

    def measured(spec: Any, loop: Any, subject: Any, ctx: Any) -> Latency:
        return Latency(10.0, {cut.id: 1.0 + 3 * index for index, cut in enumerate(subject.cuts)}, 1)

    monkeypatch.setattr(stage, "measured_latency", measured)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Profile and weights of tiny:ddpm under the settings SMALL, as a run that was interrupted leaves them."""
    bench = Bench(tmp_path_factory.mktemp("measured"), {"method": "dp", "budget": {"speedup": 1.01}, **PLAIN, **SMALL})
    bench.run()
    for name in ("latency.json", "trials.json"):
        (bench.ctx.resume / name).unlink(missing_ok=True)
    return bench.ctx.resume


@pytest.fixture
def quantized(tmp_path: Path, make_state: Any) -> Artifact:
    """A calibrated artifact of tiny:ddpm."""
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}, "sampler": {"scheduler": "DDIMScheduler", "steps": STEPS}})
    artifact = Artifact(tmp_path / "source", MANIFEST)
    artifact.folder.mkdir()
    write_state(artifact.folder, make_state(load_pipeline(recipe.model, recipe.sampler).denoiser, bits_w=8))
    return artifact


@pytest.mark.parametrize(
    ("section", "refreshes"),
    [
        ({"method": "uniform", "interval": 3}, (0, 3, 6, 9)),
        ({"method": "uniform", "interval": 1}, tuple(range(STEPS))),
        ({"method": "deepcache", "interval": 3, "center": 3}, None),
        ({"method": "deepcache", "interval": 3, "center": 3, "formula": "paper"}, None),
        ({"method": "deepcache-ldm", "interval": 3}, (0, 1, 3, 6)),
        ({"method": "mask", "mask": "1001 0000 10"}, (0, 3, 8)),
    ],
)
def test_rules(tmp_path: Path, section: dict[str, Any], refreshes: tuple[int, ...] | None) -> None:
    bench = Bench(tmp_path, {**section, **PLAIN})
    result = bench.run()
    schedule = bench.schedule
    assert schedule.refreshes == refreshes or (refreshes is None and schedule.refreshes[0] == 0)
    assert schedule.provenance.method == section["method"]
    assert (result.metrics["calls"], result.metrics["full_calls"]) == (STEPS, len(schedule.refreshes))
    assert schedule.model.quant_sha256 is None and not (bench.ctx.payload / STATE_FILE).exists()
    assert Image.open(bench.ctx.payload / "schedule.png").size[0] > 100


def test_second_order_solvers_count_steps(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"method": "uniform", "interval": 3, **PLAIN}, "tiny:sd", 9, scheduler="HeunDiscreteScheduler")
    bench.run()
    assert bench.schedule.sampler.calls == 17
    assert bench.schedule.refreshes == (0, 6, 12)


def test_a_chosen_cut(tmp_path: Path) -> None:
    bench = Bench(tmp_path, {"method": "uniform", "cut": 3, **PLAIN})
    bench.run()
    assert [cut.m for cut in bench.schedule.cuts] == [3]


def test_transformers_reuse_a_block_range(tmp_path: Path) -> None:
    section = {"method": "uniform", "cut": {"range": [1, None]}, **PLAIN}
    bench = Bench(tmp_path, section, "tiny:dit", 9)
    bench.run()
    assert [(cut.kind, cut.range) for cut in bench.schedule.cuts] == [("block_residual", (1, None))]
    written = json.loads((bench.ctx.payload / stage.CACHE_DIT_FILE).read_text())
    assert written["steps_computation_mask"] == [1, 0, 0] * 3


@pytest.mark.usefixtures("fixed_latency")
class TestPlanning:
    def test_a_plan_keeps_its_budget_and_is_verified(self, tmp_path: Path, measured: Path) -> None:
        section = {"method": "dp", "budget": {"speedup": 2.0}, "verify": {"samples": 1, "baseline": "all"}, **SMALL}
        bench = Bench(tmp_path, section, measured=measured)
        result = bench.run()
        schedule = bench.schedule
        assert schedule.predicted is not None and schedule.predicted.speedup is not None and schedule.predicted.speedup >= 2
        assert schedule.provenance.profile_sha256 == hash_file(bench.ctx.payload / "profile.safetensors")
        latencies = [point.latency_ms for point in schedule.pareto]
        costs = [point.cost for point in schedule.pareto]
        assert latencies == sorted(latencies) and costs == sorted(costs, reverse=True)
        assert schedule.verified is not None and schedule.verified.baseline["steps"] == round(STEPS / schedule.predicted.speedup)
        assert result.metrics["latent_error"] == result.metrics["latent_error_to_uncached"] > 0
        assert (
            result.metrics["uniform_latency_ms"] >= schedule.predicted.latency_ms and result.metrics["uniform_latent_error_to_uncached"] > 0
        )
        assert {"similarity-up1.png", "pareto.png", "schedule.png"} <= {path.name for path in bench.ctx.payload.iterdir()} or schedule.cuts

    def test_the_quantized_model_is_planned_and_carried(self, tmp_path: Path, quantized: Artifact) -> None:
        bench = Bench(tmp_path, {"method": "dp", "verify": FEW, **SMALL})
        result = bench.run(quantized)
        assert bench.schedule.model.quant_sha256 == hash_file(quantized.folder / STATE_FILE) == hash_file(bench.ctx.payload / STATE_FILE)
        assert result.layers == MANIFEST.layers
        found = result.metrics
        joint, parts = found["latent_error_both"], found["latent_error_cache"] + found["latent_error_quantization"]
        assert found["interaction"] == pytest.approx(joint - parts) and joint == pytest.approx(found["latent_error"])
        assert min(found["latent_error_cache"], found["latent_error_quantization"]) > 0

    def test_more_speed_costs_more_error(self, tmp_path: Path, measured: Path) -> None:
        errors = []
        for speedup in (1.05, 2.5):
            section = {"method": "dp", "budget": {"speedup": speedup}, "verify": FEW, **SMALL}
            bench = Bench(tmp_path / str(speedup), section, measured=measured)
            errors.append(bench.run().metrics["latent_error"])
        assert errors[0] < errors[1]

    def test_an_error_budget_is_measured(self, tmp_path: Path, measured: Path) -> None:
        section = {"method": "dp", "budget": {"latent_error": 10.0}, "verify": FEW, **SMALL}
        loose = Bench(tmp_path / "loose", section, measured=measured)
        found = loose.run().metrics
        fastest = loose.schedule.pareto[0]
        assert loose.schedule.refreshes == fastest.refresh
        wanted = found["latent_error_to_uncached"] / 2
        tight = Bench(tmp_path / "tight", {**section, "budget": {"latent_error": wanted}}, measured=measured)
        assert tight.run().metrics["latent_error_to_uncached"] <= wanted
        assert len(tight.schedule.refreshes) > len(fastest.refresh)

    def test_a_budget_out_of_reach(self, tmp_path: Path, measured: Path) -> None:
        bench = Bench(tmp_path, {"method": "dp", "budget": {"speedup": 50.0}, **PLAIN, **SMALL}, measured=measured)
        with pytest.raises(GateFailed, match=r"cannot be reached: the fastest schedule takes .* Allow longer intervals"):
            bench.run()

    @pytest.mark.parametrize("settings", [{"correction": "dec"}, {"predict": "linear"}], ids=["corrections", "extrapolation"])
    def test_an_error_budget_is_kept_by_what_is_written(self, tmp_path: Path, measured: Path, settings: dict[str, Any]) -> None:
        """The figure of the budget is that of the schedule with its corrections or extrapolation, as the verification finds it again."""

        lines: list[str] = []

        class Said(Silent):
            def log(self, message: str) -> None:
                lines.append(message)

        section = {"method": "dp", "budget": {"latent_error": 0.3}, "verify": FEW, **SMALL, **settings}
        bench = Bench(tmp_path, section, measured=measured)
        bench.ctx.events = Said()
        found = bench.run().metrics["latent_error_to_uncached"]
        assert bench.schedule.corrections is not None or "predict" in settings
        kept = [line for line in lines if line.startswith("budget: ") and line.endswith(", kept")]
        assert f"latent_error {found:.4g}, kept" in kept[-1] and found <= 0.3

    def test_a_budget_goes_on_where_it_was_left(self, tmp_path: Path, measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second run measures nothing but the uncached model, and chooses the same."""
        section = {"method": "dp", "budget": {"latent_error": 0.3}, **PLAIN, **SMALL}
        bench = Bench(tmp_path, section, measured=measured)
        bench.run()
        first, sampled = bench.schedule.actions, []
        sample = verify.sample
        monkeypatch.setattr(verify, "sample", lambda *args: (sampled.append(args[3]), sample(*args))[1])
        Bench(tmp_path, section).run()
        assert bench.schedule.actions == first and sampled == [None]

    def test_an_error_budget_that_only_the_uncached_model_keeps(self, tmp_path: Path, measured: Path) -> None:
        bench = Bench(tmp_path, {"method": "dp", "budget": {"latent_error": 1e-9}, "verify": FEW, **SMALL}, measured=measured)
        with pytest.raises(
            GateFailed, match=r"no schedule that reuses anything keeps latent_error 1e-09; the slowest reaches 1\.\d+x: lat"
        ):
            bench.run()
        bench.ctx.smoke = True
        bench.run()
        assert "no schedule that reuses anything" in bench.ctx.warnings[-1]

    def test_full_calls_at_both_ends(self, tmp_path: Path, measured: Path) -> None:
        section = {"method": "dp", "budget": {"speedup": 1.3}, "first_full": 3, "last_full": 2, **PLAIN, **SMALL}
        bench = Bench(tmp_path, section, measured=measured)
        bench.run()
        assert {0, 1, 2, STEPS - 2, STEPS - 1} <= set(bench.schedule.refreshes)

    @pytest.mark.parametrize(
        "section",
        [
            {"drift": "feature", "sensitivity": "analytic", "objective": "minimax", "predict": "linear"},
            {"sensitivity": "none", "mixed": False, "objective": "lexicographic"},
        ],
        ids=["feature", "one cut"],
    )
    def test_settings(self, tmp_path: Path, section: dict[str, Any]) -> None:
        bench = Bench(tmp_path, {"method": "dp", "budget": {"speedup": 1.4}, **PLAIN, **SMALL, **section})
        bench.run()
        assert bench.schedule.predicted is not None
        assert max(b - a for a, b in zip(bench.schedule.refreshes, [*bench.schedule.refreshes[1:], STEPS], strict=True)) <= 4

    def test_corrections_lie_beside_the_schedule(self, tmp_path: Path, measured: Path) -> None:
        bench = Bench(tmp_path, {"method": "dp", **PLAIN, **SMALL, "correction": "dec"}, measured=measured)
        bench.run()
        named = bench.schedule.corrections
        assert named is not None and named.sha256 == hash_file(bench.ctx.payload / named.file)

    @pytest.mark.usefixtures("fixed_latency")
    def test_plans_of_a_quantized_model_are_compared_by_their_error_to_full_precision(self, tmp_path: Path, quantized: Artifact) -> None:
        """A plan that reuses nothing still has the error of quantization."""
        bench = Bench(tmp_path, {"method": "dp", "budget": {"speedup": 1.2}, **PLAIN, **SMALL, "refine": 2})
        bench.run(quantized)
        trials = json.loads((bench.ctx.resume / "trials.json").read_text())
        errors = next(errors for refreshes, _, errors in trials if tuple(refreshes) == bench.schedule.refreshes)
        models = stage.load(quantized, bench.ctx)
        start = stage.PROFILE_START
        truth = models.base.run(start, 1)
        with following(models.own, bench.schedule):
            own = models.own.run(start, 1)
        assert errors == pytest.approx(relative_errors(own, truth).tolist(), rel=1e-6)
        assert errors != pytest.approx(relative_errors(own, models.own.run(start, 1)).tolist(), rel=1e-3)

    def test_extrapolating_plans_keep_one_cut_and_are_corrected_too(self, tmp_path: Path) -> None:
        bench = Bench(tmp_path, {"method": "dp", **PLAIN, **SMALL, "predict": "linear", "correction": "dec"})
        bench.run()
        partial = [action for action in bench.schedule.actions if action.action == "partial"]
        assert len({action.cut for action in partial}) == 1 and bench.schedule.corrections is not None
        assert all(action.order == 0 for action in partial if action.source == 0)

    def test_measurements_are_kept_for_a_run_that_continues(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        section = {"method": "dp", **PLAIN, **SMALL}
        Bench(tmp_path, section).run()
        monkeypatch.setattr("qdm_cli.engine.caching.drive.Loop.run", lambda *_: pytest.fail("measured again"))
        Bench(tmp_path, section).run()


@pytest.mark.usefixtures("fixed_latency")
def test_ranges_are_measured_again_along_the_cached_trajectory(tmp_path: Path, make_state: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of steps that run a layer get its largest input there; rows of partial calls keep those of layers that they leave out."""
    monkeypatch.setattr(stage, "remeasured", partial(stage.remeasured, rule=RangeRule("max")))
    monkeypatch.setattr(stage, "RANGE_SAMPLES", 1)
    bench = Bench(tmp_path, {"method": "uniform", "interval": 5, "ranges": "remeasured", **PLAIN})
    loaded = load_pipeline(bench.recipe.model, bench.recipe.sampler)
    loaded.pipeline.scheduler.set_timesteps(STEPS)
    times = [float(t) for t in loaded.pipeline.scheduler.timesteps]
    before = make_state(loaded.denoiser, keys=times, bits_w=8, timestep_aware=True, act_symmetric=True)
    source = Artifact(tmp_path / "source", MANIFEST)
    source.folder.mkdir()
    write_state(source.folder, before)
    bench.run(source)
    after = read_state(bench.ctx.payload)
    inner = next(name for name in after.layers if name.startswith("mid_block") and after.layers[name].decision.timestep_aware)
    outer = "up_blocks.1.resnets.1.conv1"
    same = {name: after.layers[name].act_scale == before.layers[name].act_scale for name in (inner, outer)}
    assert [row for row, kept in enumerate(same[inner].tolist()) if not kept] == [0, 5]
    assert not same[outer].any()
    assert torch.equal(after.layers[inner].codes, before.layers[inner].codes)


def test_latency_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(tmp_path, {"method": "uniform", **PLAIN})
    bench.run()
    stored = json.loads((bench.ctx.resume / "latency.json").read_text())
    assert stored["full_ms"] > 0 and set(stored["partial_ms"]) == {"up1"}
    monkeypatch.setattr(stage, "measure", lambda *_, **__: pytest.fail("measured again"))
    bench.run()


class TestRefusals:
    def test_few_steps_unless_forced(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"8 steps are too few to cache.*Set cache\.force"):
            Bench(tmp_path, {"method": "uniform", **PLAIN}, steps=8).run()
        forced = Bench(tmp_path, {"method": "uniform", "force": True, **PLAIN}, steps=8)
        assert forced.run().metrics["full_calls"] == 3

    @pytest.mark.parametrize(
        ("section", "model", "message"),
        [
            ({"method": "uniform", "cut": 99}, "tiny:ddpm", r"cache\.cut: .*skip branches 1 to"),
            ({"method": "dp", "cuts": [1, 99]}, "tiny:ddpm", r"cache\.cuts: .*skip branches 1 to"),
            ({"method": "uniform", "cut": 1}, "tiny:dit", r"cache\.cut: .*no skip branches"),
            ({"method": "uniform", "cut": {"range": [5, 90]}}, "tiny:dit", r"cache\.cut: .*blocks 0 to"),
            ({"method": "deepcache", "interval": 4, "center": 40}, "tiny:ddpm", r"cache\.center: center must lie in 0\.\.9"),
            ({"method": "mask", "mask": "10"}, "tiny:ddpm", r"cache\.mask: has 2 digits for 10 steps"),
            ({"method": "uniform", "interval": 13}, "tiny:ddpm", r"cache\.interval: interval must lie in 1\.\.10"),
        ],
    )
    def test_settings_that_do_not_fit(self, tmp_path: Path, section: dict[str, Any], model: str, message: str) -> None:
        with pytest.raises(InputError, match=message):
            Bench(tmp_path, {**section, **PLAIN}, model).run()
