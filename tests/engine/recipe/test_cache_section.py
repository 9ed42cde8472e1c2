"""The section `cache`: its union, and what only several settings together can break."""

from __future__ import annotations

import io

import pytest

from qdm_cli.engine.caching.config import DpConfig
from qdm_cli.engine.errors import RecipeError
from qdm_cli.engine.recipe import load_recipe
from qdm_cli.engine.recipe.checks import stages_of
from qdm_cli.engine.run.smoke import smoke_recipe

BASE = "model: {id: tiny:ddpm}\nsampler: {steps: 20}\ncache: "


def refusals(section: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("-", stdin=io.StringIO(BASE + section + "\n"))
    return [f"{problem.path}: {problem.message}" for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (
            "{method: dp, budget: {}}",
            "cache.budget: needs exactly one of speedup, latency_ms, latent_error, psnr, lpips, clip_drop, fid_increase (got none)",
        ),
        ("{method: dp, budget: {fid_increase: 0.02}}", "cache.budget.fid_increase: needs cache.verify.samples of at least 500"),
        ("{method: dp, budget: {speedup: 2, psnr: 30}}", "cache.budget: needs exactly one of .* (got speedup, psnr)"),
        ("{method: dp, cuts: []}", "cache.cuts: names no cut; write auto for the defaults"),
        ("{method: dp, max_interval: 21}", "cache.max_interval: is larger than sampler.steps (20)"),
        ("{method: uniform, interval: 11}", "cache.interval: needs at least 22 steps (sampler.steps is 20)"),
        ("{method: deepcache, interval: 5, center: 20}", "cache.center: must be below sampler.steps (20)"),
        ("{method: mask, mask: '1010'}", "cache.mask: has 4 digits for 20 steps"),
        ("{method: mask, mask: '00001000010000100001'}", "cache.mask: must begin with 1"),
        ("{method: uniform, intervall: 3}", "cache.intervall: unknown setting. Did you mean 'interval'?"),
        ("{method: deepcash}", "cache.method: 'deepcash' is not a method. Did you mean 'deepcache'?"),
        ("{method: uniform, budget: {speedup: 2}}", "cache.budget: is a setting of method dp, not of uniform"),
    ],
)
def test_one_line_per_problem(section: str, says: str) -> None:
    (found,) = refusals(section)
    start, _, end = says.partition(" .* ")
    assert found.startswith(start) and end in found


def test_few_steps_are_refused_unless_forced() -> None:
    text = "model: {id: tiny:ddpm}\nsampler: {steps: 8}\ncache: {method: uniform, interval: 2}\n"
    with pytest.raises(RecipeError, match="8 steps are too few to cache"):
        load_recipe("-", stdin=io.StringIO(text))
    assert load_recipe("-", ["cache.force=true"], stdin=io.StringIO(text)).recipe.cache.force


def test_the_stage_stands_between_training_and_export() -> None:
    text = BASE + "{method: dp}\nexport: {}\nfinetune: {method: efficientdm}\n"
    assert stages_of(load_recipe("-", stdin=io.StringIO(text)).recipe) == ["finetune", "cache", "export"]


@pytest.mark.parametrize(
    "section", ["{method: dp, budget: {psnr: 30}}", "{method: deepcache}", "{method: mask, mask: '10010000100001000010'}"]
)
def test_a_smoke_run_is_small_and_still_valid(section: str) -> None:
    small = smoke_recipe(load_recipe("-", stdin=io.StringIO(BASE + section + "\n")).recipe)
    assert small.sampler.steps == 4
    if isinstance(small.cache, DpConfig):
        assert small.cache.data.samples == 2 and small.cache.budget.psnr is None
    if small.cache.method == "mask":
        assert small.cache.mask == "1001"
