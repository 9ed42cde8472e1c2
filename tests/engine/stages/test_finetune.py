"""The stage `finetune` where images adapt a quantized model: every method, what it leaves, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdm_cli.engine.artifact import Artifact
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant import rivals
from qdm_cli.engine.quant.state import read_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.load import load_recipe
from qdm_cli.engine.run import run_stage

RECIPE = """
name: adapt
model: {{id: "tiny:{model}"}}
sampler: {{scheduler: DDIMScheduler, steps: 4}}
device: {{name: cpu}}
quantize: {{weights: {{init: max}}, activations: null, policy: edges-w8}}
calibrate: {{method: minmax, data: {{samples: 1, batch: 1}}, samples_per_step: 1}}
finetune: {{method: {method}, data: {{images: "builtin:digits", limit: 8}}, iterations: 6, batch_size: 4, schedule: constant}}
export: {{verify: false}}
"""
METHODS = ("peqa", "tuneqdm", "qlora", "full")
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")


def recipe(folder: Path, method: str, *overrides: str, model: str = "ddpm") -> Any:
    path = folder / f"{method}.yaml"
    path.write_text(RECIPE.format(method=method, model=model))
    return load_recipe(str(path), list(overrides)).recipe


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Artifact]:
    folder = tmp_path_factory.mktemp("adapt")
    return folder, run_stage("calibrate", recipe(folder, "peqa"), runs_root=folder / "runs").artifact


def finetune(calibrated: tuple[Path, Artifact], method: str, *overrides: str) -> Artifact:
    folder, source = calibrated
    return run_stage("finetune", recipe(folder, method, *overrides), source=source, runs_root=folder / "runs").artifact


def prediction(folder: Path | None, recipe: Any) -> torch.Tensor:
    denoiser = load_pipeline(recipe.model, recipe.sampler).denoiser
    if folder is not None:
        apply_state_(denoiser, read_state(folder))
    size, channels = denoiser.config.sample_size, denoiser.config.in_channels
    x = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.stack([denoiser(x, t, return_dict=False)[0] for t in (10, 900)])


@pytest.mark.parametrize("method", [pytest.param(name, marks=needs_peft if name == "qlora" else ()) for name in METHODS])
def test_training_lowers_the_loss_and_is_in_the_artifact(calibrated: Any, method: str) -> None:
    rate = "lr: {output_scale: 3.0e-2, input_scale: 3.0e-2}" if method == "tuneqdm" else f"lr: {1e-3 if method == 'full' else 3e-2}"
    name, _, value = rate.partition(": ")
    found = finetune(calibrated, method, f"finetune.{name}={value}")
    metrics = found.manifest.metrics
    assert metrics["loss_last"] < 0.97 * metrics["loss_first"]
    before, after = (prediction(folder, recipe(calibrated[0], method)) for folder in (calibrated[1].folder, found.folder))
    assert float((after - before).norm() / before.norm()) > 1e-2
    assert metrics["trained_parameters"] > 0
    assert (metrics["trained_share"] == 1.0) == (method == "full")
    if method in ("peqa", "tuneqdm"):
        assert metrics["personalisation_bytes"] == (found.folder / "scales.safetensors").stat().st_size
    codes = {name: layer.codes for name, layer in read_state(calibrated[1].folder).layers.items()}
    kept = read_state(found.folder).layers
    assert set(kept) == (set() if method == "full" else set(codes))
    assert all(torch.equal(layer.codes, codes[name]) for name, layer in kept.items()), "the integers are as they were"


@needs_peft
def test_an_update_is_merged_by_the_dequantized_export_alone(calibrated: Any) -> None:
    from qdm_cli.engine.runtime.folder import dequantized_tensors, packed_tensors

    found = finetune(calibrated, "qlora", "finetune.lr=3e-2")
    given, state = recipe(calibrated[0], "qlora"), read_state(found.folder)
    denoiser = load_pipeline(given.model, given.sampler).denoiser
    with pytest.raises(InputError, match="low-rank updates beside its integers"):
        packed_tensors(denoiser, state)
    denoiser.load_state_dict(dequantized_tensors(denoiser, state, torch.float32))
    wanted = prediction(found.folder, given)
    size = denoiser.config.sample_size
    x = torch.randn(2, denoiser.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        merged = torch.stack([denoiser(x, t, return_dict=False)[0] for t in (10, 900)])
    assert float((merged - wanted).norm() / wanted.norm()) < 1e-5
    with pytest.raises(InputError, match="trained by method qlora or full"):
        run_stage("finetune", recipe(calibrated[0], "peqa"), source=found, runs_root=calibrated[0] / "runs")


def test_qlora_without_peft_says_what_to_install(calibrated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match=r"pip install 'qdm\[train\]'") as caught:
        finetune(calibrated, "qlora", "finetune.rank=3")
    assert caught.value.exit_code == 3


def test_more_experts_than_steps_are_refused(calibrated: Any) -> None:
    with pytest.raises(InputError, match="5 intervals, but the sampler has 4 steps"):
        finetune(calibrated, "tuneqdm", "finetune.intervals.k=5")


def test_intervals_that_the_sampler_never_visits_are_warned_of(calibrated: Any) -> None:
    """Steps 750, 500, 250 and 0 of four; clusters of the digits are short at one end."""
    overrides = ("finetune.intervals={method: optimal_denoiser, k: 4, min_len: 1, samples: 8}", "finetune.iterations=1")
    found = finetune(calibrated, "tuneqdm", *overrides)
    keys = read_state(found.folder).scales.keys.tolist()
    visited = {max(i for i, key in enumerate(keys) if key <= t) for t in (750, 500, 250, 0)}
    warned = [text for text in found.manifest.warnings if "never visits" in text]
    assert len(warned) == (len(visited) < 4)
    assert not warned or f"{4 - len(visited)} of 4 time-step intervals" in warned[0]
    assert len(visited) < 4, "or this shows nothing"


def test_prior_samples_and_an_average_are_used(calibrated: Any) -> None:
    plain = finetune(calibrated, "peqa")
    prior = finetune(calibrated, "peqa", "finetune.prior={images: 4, weight: 2.0}")
    average = finetune(calibrated, "peqa", "finetune.ema=0.9")
    scales = [read_state(a.folder).scales.layers["conv_in"].out for a in (plain, prior, average)]
    assert not torch.equal(scales[0], scales[1]) and not torch.equal(scales[0], scales[2])
    steps = [json.loads(line)["update"] for line in (plain.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [6]


def test_a_prompt_is_refused_by_a_model_without_text(calibrated: Any) -> None:
    with pytest.raises(InputError, match="DDIMPipeline takes no text"):
        finetune(calibrated, "peqa", "finetune.data.instance_prompt=a photo of sks dog")


def test_prompts_reach_a_model_with_text(tmp_path: Path) -> None:
    """DreamBooth's instance prompt changes what is learned, and every image may have its own."""
    from PIL import Image

    images = tmp_path / "images"
    images.mkdir()
    for index, size in enumerate([(40, 30), (16, 50)]):
        Image.new("RGB", size, (50 * index, 90, 200)).save(images / f"{index}.png")
    common = (f"finetune.data={{images: {images}}}", "finetune.iterations=2", "finetune.batch_size=1")
    source = run_stage("calibrate", recipe(tmp_path, "peqa", model="sd"), runs_root=tmp_path / "runs").artifact
    found = []
    for prompt in (None, "a photo of sks dog"):
        extra = () if prompt is None else (f"finetune.data.instance_prompt={prompt}",)
        given = recipe(tmp_path, "peqa", *common, *extra, model="sd")
        found.append(run_stage("finetune", given, source=source, runs_root=tmp_path / "runs").artifact)
    a, b = (read_state(artifact.folder).scales.layers["conv_in"].out for artifact in found)
    assert not torch.equal(a, b)
