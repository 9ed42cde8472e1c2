"""Budgets of quality: each figure against the uncached samples of the same model, and what is said where it cannot be measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qdm_cli.engine.caching.config import CacheBudget, CacheVerify
from qdm_cli.engine.caching.drive import Loop
from qdm_cli.engine.caching.verify import Samples
from qdm_cli.engine.context import RunContext
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.evaluation import clip
from qdm_cli.engine.evaluation.distribution import extract, fashion_extractor, shipped_reference
from qdm_cli.engine.evaluation.frechet import frechet_distance, gaussian_of
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.models.tiny_text import clip_tokenizer
from qdm_cli.engine.recipe.schema import ModelSpec, Recipe, SamplerSpec
from qdm_cli.engine.stages import _budget as budgets

COUNT = 80


def samples(seed: int, shape: tuple[int, ...] = (1, 32, 32), near: Samples | None = None) -> Samples:
    images = torch.rand(COUNT, *shape, generator=torch.Generator().manual_seed(seed))
    images = images if near is None else torch.lerp(near.images, images, 0.3)
    return Samples(images, images, 1.0)


@pytest.fixture
def context(tmp_path: Path) -> RunContext:
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}})
    return RunContext(recipe, tmp_path / "cache-12345678.partial", offline=True)


def loop(name: str) -> Loop:
    sampler = SamplerSpec(steps=2)
    return Loop(load_pipeline(ModelSpec(id=name), sampler), sampler)


@pytest.fixture(scope="module")
def text() -> Loop:
    return loop("tiny:sd")


@pytest.fixture(scope="module")
def plain() -> Loop:
    return loop("tiny:ddpm")


def criterion(budget: dict[str, float], truth: Samples, base: Loop, ctx: RunContext, **check: Any) -> budgets.Criterion:
    return budgets.criterion_of(CacheBudget(**budget), CacheVerify(samples=COUNT, batch=COUNT, **check), truth, base, ctx)


@pytest.mark.parametrize(("name", "ideal"), [("psnr", 100.0), ("latent_error", 0.0), ("fid_increase", 0.0)])
def test_the_uncached_samples_themselves_keep_every_budget(plain: Loop, context: RunContext, name: str, ideal: float) -> None:
    truth = samples(1)
    found = criterion({name: 0.5}, truth, plain, context)
    assert found.measure(truth) == pytest.approx(ideal, abs=1e-9) and found.kept(ideal)
    worse = found.measure(samples(2, near=truth))
    assert worse < ideal if found.least else worse > ideal


def test_a_budget_holds_from_its_side() -> None:
    assert not budgets.Criterion("psnr", 30.0, lambda _: 0.0, least=True).kept(29.9)
    assert not budgets.Criterion("latent_error", 0.1, lambda _: 0.0).kept(0.11)


def test_fid_increase_is_the_growth_of_the_distance_to_real_images(plain: Loop, context: RunContext) -> None:
    truth, other = samples(1), samples(2)
    features, real = fashion_extractor("cpu"), shipped_reference().moments
    before, after = (frechet_distance(gaussian_of(extract(features, [x.images])), real) for x in (truth, other))
    assert criterion({"fid_increase": 0.02}, truth, plain, context).measure(other) == pytest.approx(after / before - 1, abs=1e-6)


def test_other_images_need_named_features(plain: Loop, context: RunContext) -> None:
    with pytest.raises(EnvironmentProblem, match=r"fid_increase cannot be measured: cache\.verify\.inception names no weight file"):
        criterion({"fid_increase": 0.02}, samples(1, (3, 16, 16)), plain, context)


def test_lpips_is_a_mean_over_pairs(plain: Loop, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    truth, other = samples(1), samples(2)
    monkeypatch.setattr(budgets, "PART", 32)
    monkeypatch.setattr(budgets, "load_lpips", lambda *_, **__: (lambda a, b: (a - b).abs().mean(dim=(1, 2, 3)), None))
    wanted = float((truth.images - other.images).abs().mean())
    assert criterion({"lpips": 0.1}, truth, plain, context).measure(other) == pytest.approx(wanted, rel=1e-5)


def test_lpips_that_is_not_here(plain: Loop, context: RunContext, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budgets, "load_lpips", lambda *_, **__: (None, "offline, and the backbone is not here"))
    with pytest.raises(EnvironmentProblem, match=r"cache\.budget\.lpips cannot be measured: offline") as caught:
        criterion({"lpips": 0.1}, samples(1), plain, context)
    assert caught.value.exit_code == 3


class TestClip:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A CLIP of one layer with random weights."""
        from transformers import CLIPConfig, CLIPModel

        tokenizer = clip_tokenizer()
        layer = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        config = CLIPConfig(
            text_config={**layer, "vocab_size": len(tokenizer), **ids},
            vision_config={**layer, "image_size": 16, "patch_size": 8},
            projection_dim=8,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(6)
            CLIPModel(config).save_pretrained(tmp_path / "clip")
        tokenizer.save_pretrained(tmp_path / "clip")
        return tmp_path / "clip"

    def test_the_drop_is_the_difference_of_mean_scores(self, text: Loop, context: RunContext, folder: Path) -> None:
        truth, other = samples(1, (3, 24, 16)), samples(2, (3, 24, 16))
        found = criterion({"clip_drop": 0.1}, truth, text, context, clip=str(folder))
        assert found.measure(truth) == pytest.approx(0, abs=1e-4)
        there = found.measure(other)
        back = criterion({"clip_drop": 0.1}, other, text, context, clip=str(folder)).measure(truth)
        assert there == pytest.approx(-back, abs=1e-3) and abs(there) > 1e-3

    def test_scores_follow_the_caption(self, folder: Path) -> None:
        score, why = clip.load_clip(str(folder), offline=True)
        assert score is not None and why is None
        images = torch.rand(2, 1, 20, 30, generator=torch.Generator().manual_seed(1))
        one, two = score(images, ["a dog", "a dog"]), score(images, ["a dog", "two cats"])
        assert one.shape == (2,) and one[0] == pytest.approx(float(two[0]), abs=1e-3) and abs(one[1] - two[1]) > 1e-3

    def test_the_middle_is_cut_out(self) -> None:
        image = torch.zeros(1, 3, 4, 12)
        image[..., 4:8] = 1
        deviation, mean = (torch.tensor(values).view(3, 1, 1) for values in (clip.DEVIATION, clip.MEAN))
        torch.testing.assert_close(clip.prepared(image, 4)[0] * deviation + mean, torch.ones(3, 4, 4))

    def test_a_model_that_is_not_here(self, text: Loop, context: RunContext) -> None:
        with pytest.raises(EnvironmentProblem, match=r"clip_drop cannot be measured: no/such could not be loaded, offline"):
            criterion({"clip_drop": 0.1}, samples(1), text, context, clip="no/such")

    def test_pipelines_without_prompts(self, plain: Loop, context: RunContext) -> None:
        with pytest.raises(InputError, match="takes no prompts"):
            criterion({"clip_drop": 0.1}, samples(1), plain, context)
