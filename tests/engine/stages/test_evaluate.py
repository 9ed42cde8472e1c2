"""The stage `evaluate` on small random pipelines: simulated, exported and base models."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from qdm_cli.engine.artifact import Artifact, Manifest
from qdm_cli.engine.context import RunContext, Silent
from qdm_cli.engine.errors import GateFailed, InputError, RecipeError
from qdm_cli.engine.evaluation import session as session_module
from qdm_cli.engine.evaluation.names import METRICS, of_suites
from qdm_cli.engine.quant.state import read_state, write_state
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.stages.calibrate import calibrate
from qdm_cli.engine.stages.evaluate import evaluate

RECIPE: dict[str, Any] = {
    "model": {"id": "tiny:ddpm"},
    "sampler": {"scheduler": "DDIMScheduler", "steps": 3},
    "quantize": {"weights": {"bits": 4}, "activations": {"bits": 8, "timestep_aware": True}},
    "calibrate": {"method": "minmax", "data": {"samples": 2, "batch": 2}},
    "export": {"verify": False},
}
EVALUATE: dict[str, Any] = {"suites": ["fidelity", "distribution", {"method": "cost", "repeats": 3}], "samples": 4, "batch": 4, "grid": 2}


class Recorder(Silent):
    """Events with a memory."""

    def __init__(self) -> None:
        self.tasks: list[str] = []

    def progress(self, task: str, done: int, total: int, note: str = "") -> None:
        assert 0 <= done <= total
        self.tasks.append(task)


def context(root: Path, name: str, evaluate_section: dict[str, Any] | None = None, **recipe: Any) -> RunContext:
    work = root / f"{name}.partial"
    (work / "payload").mkdir(parents=True, exist_ok=True)
    (work / "resume").mkdir(exist_ok=True)
    loaded = Recipe.model_validate({**RECIPE, "evaluate": {**EVALUATE, **(evaluate_section or {})}, **recipe})
    return RunContext(recipe=loaded, work=work, events=Recorder(), offline=True)


def judge(ctx: RunContext, source: Artifact | None) -> tuple[Any, dict[str, Any]]:
    """Run the stage; its result and metrics.json."""
    assert ctx.recipe.evaluate is not None
    result = evaluate(ctx.recipe.evaluate, source, ctx)
    return result, json.loads((ctx.payload / "metrics.json").read_text())


def artifact(folder: Path, kind: str, **fields: Any) -> Artifact:
    return Artifact(folder, Manifest(schema=1, kind=kind, stage="x", key="k", digest=kind * 8, files={}, **fields))


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    ctx = context(tmp_path_factory.mktemp("runs"), "calibrate-00000000")
    result = calibrate(ctx.recipe.calibrate, None, ctx)
    return artifact(ctx.payload, "calibrated", layers=result.layers, simulated=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def simulated(root: Path, calibrated: Artifact) -> Iterator[tuple[RunContext, Any, dict[str, Any]]]:
    ctx = context(root, "evaluate-00000000")
    yield ctx, *judge(ctx, calibrated)


def test_a_simulated_model_has_images_and_errors(simulated: Any) -> None:
    _, result, written = simulated
    metrics = written["metrics"]
    assert 5 < metrics["psnr"] < 60 and metrics["psnr_worst"] <= metrics["psnr"]
    assert 0 < metrics["ssim"] < 1
    assert 0 < metrics["noise_error"] < 1 and metrics["noise_error_worst"] >= metrics["noise_error"]
    assert metrics["latent_error"] > 0 and metrics["latent_mse_last"] > 0
    assert 4 < metrics["bits_w_mean"] < 8
    assert 4 * 8 / 1024 <= metrics["bops_vs_fp32"] < 0.5
    assert result.metrics == metrics and result.primary == "metrics.json" and result.gate is None


def test_every_metric_is_there_and_null_ones_say_why(simulated: Any) -> None:
    metrics = simulated[2]["metrics"]
    names = {name for name in metrics if not name.endswith("_why")}
    assert names == set(of_suites({"fidelity", "distribution", "cost"})) == set(METRICS)
    for name in names:
        assert (metrics[name] is None) == isinstance(metrics.get(f"{name}_why"), str), name


def test_speed_of_a_simulated_model_is_null_in_words(simulated: Any) -> None:
    ctx, result, written = simulated
    for name in ("latency_p50_ms", "speedup", "images_per_s", "size_mb", "memory_weights_mb"):
        assert written["metrics"][name] is None and "simulated" in written["metrics"][f"{name}_why"]
    assert result.simulated and written["simulated"]
    assert written["note"].startswith("Simulated")
    for name in ("report.html", "report.md"):
        assert "Simulated: this artifact is not exported" in (ctx.payload / name).read_text()


def test_offline_and_without_weights_the_rest_is_named(simulated: Any) -> None:
    metrics = simulated[2]["metrics"]
    assert "weights.lpips is not set" in metrics["lpips_why"]
    assert "weights.inception is not set" in metrics["fid_why"]
    assert "for 1x32x32" in metrics["fid[fashion]_why"]


def test_errors_per_timestep(simulated: Any) -> None:
    rows = simulated[2]["timesteps"]
    assert len(rows) == 3
    assert [row["timestep"] for row in rows] == sorted((row["timestep"] for row in rows), reverse=True)
    assert rows[0]["latent_error"] == 0, "both models start from the same noise"
    assert all(row["latent_error"] > 0 and row["latent_mse"] > 0 for row in rows[1:])
    assert all(row["noise_error"] > 0 and row["noise_mse"] > 0 for row in rows)


def test_errors_per_layer(simulated: Any) -> None:
    layers = {row["name"]: row for row in simulated[2]["layers"]}
    quantized = [row for row in layers.values() if row["skipped_why"] is None]
    assert len(quantized) > 5
    for row in quantized:
        low, high = {4: (10, 35), 8: (38, 60)}[row["bits_w"]]
        assert low < row["weight_sqnr_db"] < high, row
        assert 0 < row["output_error"] < 1, row
    kept = [row for row in layers.values() if row["skipped_why"] is not None]
    assert kept and all(row["output_error"] is None for row in kept)


def test_the_report_stands_alone(simulated: Any) -> None:
    page = (simulated[0].payload / "report.html").read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*\"([^\"]*)\"", page)
    assert len(sources) == 3 and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not re.search(r"https?://|<script|@import|url\(", page)
    assert "conv_in" in page and "psnr" in page


def test_pictures_and_samples(simulated: Any) -> None:
    payload = simulated[0].payload
    for name in ("grid", "timesteps", "layers"):
        assert (payload / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"({name}.png)" in (payload / "report.md").read_text()
    assert sorted(path.name for path in (payload / "samples").iterdir()) == [
        "00000-base.png",
        "00000-simulated.png",
        "00001-base.png",
        "00001-simulated.png",
    ]


def test_the_protocol_is_data(simulated: Any) -> None:
    protocol = simulated[2]["protocol"]
    assert protocol["common"]["sampler"]["steps"] == 3 and protocol["common"]["size"] == [3, 16, 16]
    assert protocol["fidelity"]["n"] == 4 and protocol["cost"]["repeats"] == 3
    assert protocol["versions"]["torch"] == torch.__version__


def test_the_batch_does_not_change_the_numbers(root: Path, calibrated: Artifact, simulated: Any) -> None:
    _, written = judge(context(root, "evaluate-00000001", {"batch": 3, "suites": ["fidelity"]}), calibrated)
    before = simulated[2]["metrics"]
    for name in ("psnr", "ssim", "latent_error", "noise_error"):
        assert written["metrics"][name] == pytest.approx(before[name], rel=1e-3), name


def test_images_of_the_base_model_are_made_once(root: Path, calibrated: Artifact, simulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = session_module.generate
    monkeypatch.setattr(session_module, "generate", lambda *args, **kwargs: made.append(kwargs["count"]) or real(*args, **kwargs))
    _, written = judge(context(root, "evaluate-00000002", {"suites": ["fidelity"]}), calibrated)
    assert made == [4], "the compressed model's batch alone"
    assert written["metrics"]["psnr"] == simulated[2]["metrics"]["psnr"]


def test_an_interrupted_run_keeps_its_images(root: Path, calibrated: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    real = session_module.generate
    made: list[int] = []

    def interrupted(*args: Any, **kwargs: Any) -> torch.Tensor:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(kwargs["start"])
        return real(*args, **kwargs)

    ctx = context(root, "evaluate-00000003", {"suites": ["fidelity"], "batch": 1})
    monkeypatch.setattr(session_module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        judge(ctx, calibrated)
    again: list[int] = []
    monkeypatch.setattr(session_module, "generate", lambda *args, **kwargs: again.append(kwargs["start"]) or real(*args, **kwargs))
    judge(ctx, calibrated)
    assert made == [0, 1] and again == [2, 3]


def test_without_a_run_folder_nothing_is_written_beside_it(tmp_path: Path, calibrated: Artifact) -> None:
    judge(context(tmp_path / "mine", "result", {"suites": ["fidelity"], "samples": 2}), calibrated)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["result.partial"]


def test_the_base_model_alone(root: Path) -> None:
    result, written = judge(context(root, "evaluate-00000004"), None)
    metrics = written["metrics"]
    assert written["reference"] is None and not result.simulated
    assert metrics["psnr"] is None and "base model itself" in metrics["psnr_why"]
    assert metrics["bits_w_mean"] == 16 and metrics["bops_vs_fp32"] == 1
    assert metrics["latency_p50_ms"] == metrics["latency_base_p50_ms"] > 0
    assert metrics["speedup"] == 1 and metrics["images_per_s"] > 0 and metrics["peak_memory_mb"] > 10


# ---------------------------------------------------------------- against another run


def test_against_another_run_of_the_same_protocol(root: Path, calibrated: Artifact, simulated: Any) -> None:
    section = {"suites": ["fidelity"], "against": str(simulated[0].payload), "fail_if": ["psnr_change<-0.5", "ssim_change>0.5"]}
    result, written = judge(context(root, "evaluate-00000005", section), calibrated)
    assert written["comparison"]["psnr"]["change"] == pytest.approx(0, abs=1e-6)
    assert written["against"].endswith("metrics.json") and result.gate is None
    assert "bits_w_mean" not in written["comparison"], "the suite cost did not run"


@pytest.mark.parametrize(
    ("recipe", "field"),
    [
        ({"sampler": {"scheduler": "DDIMScheduler", "steps": 2}}, "common.sampler.steps"),
        ({"seed": 1}, "common.seed"),
        ({"evaluate": {**EVALUATE, "suites": ["fidelity"], "samples": 3}}, "fidelity.n"),
    ],
    ids=["steps", "seed", "samples"],
)
def test_unlike_protocols_are_refused_before_any_image(
    root: Path, calibrated: Artifact, simulated: Any, monkeypatch: pytest.MonkeyPatch, recipe: dict[str, Any], field: str
) -> None:
    monkeypatch.setattr(session_module, "generate", lambda *args, **kwargs: pytest.fail("an image was made"))
    ctx = context(root, f"evaluate-{field}", **recipe)
    spec = ctx.recipe.evaluate.model_copy(update={"against": str(simulated[0].payload / "metrics.json")})
    with pytest.raises(InputError, match="not comparable") as caught:
        evaluate(spec, calibrated, ctx)
    assert field in str(caught.value)


@pytest.mark.parametrize("against", ["absent", "note.json"])
def test_against_something_else_is_refused(root: Path, tmp_path: Path, against: str) -> None:
    (tmp_path / "note.json").write_text('{"psnr": 3}')
    with pytest.raises(InputError, match=against):
        judge(context(root, "evaluate-against", {"against": str(tmp_path / against)}), None)


# ---------------------------------------------------------------- gates and bad input


def test_a_true_condition_is_a_gate_and_still_a_result(root: Path, calibrated: Artifact) -> None:
    section = {"suites": ["fidelity"], "fail_if": ["psnr<99", "ssim<0", "lpips>1", "lpips?>1"]}
    ctx = context(root, "evaluate-00000006", section)
    result, written = judge(ctx, calibrated)
    assert result.gate == written["gate"]
    assert result.gate.startswith("psnr<99: psnr is ") and "lpips is null" in result.gate and "ssim" not in result.gate
    assert "Gate failed" in (ctx.payload / "report.html").read_text()


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"fail_if": ["psn<3"]}, "Did you mean 'psnr'"),
        ({"suites": ["cost"], "fail_if": ["psnr<3"]}, "suite fidelity"),
        ({"suites": []}, "no suite"),
        ({"suites": ["cost", "cost"]}, "more than once"),
        ({"weights": {"inception": "/absent.pth"}}, "absent.pth"),
        ({"suites": [{"method": "distribution", "reference": "/absent"}]}, "/absent"),
    ],
)
def test_bad_settings_are_refused_before_the_model_is_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch, section: dict, match: str
) -> None:
    monkeypatch.setattr("qdm_cli.engine.stages.evaluate.load_base", lambda ctx: pytest.fail("a model was loaded"))
    with pytest.raises((InputError, RecipeError), match=match):
        judge(context(root, "evaluate-bad", section), None)


def test_an_artifact_without_a_model_is_refused(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is evaluated"):
        judge(context(root, "evaluate-kind"), artifact(tmp_path, "evaluated"))


def test_images_that_are_not_finite_fail_the_gate(root: Path, tmp_path: Path, calibrated: Artifact) -> None:
    state = read_state(calibrated.folder)
    name, layer = next(iter(state.layers.items()))
    broken = replace(layer, bias=torch.full_like(layer.bias, float("nan")))
    write_state(tmp_path, replace(state, layers={**state.layers, name: broken}))
    ctx = context(root, "evaluate-nan", {"suites": ["fidelity"]})
    with pytest.raises(GateFailed, match="image 0 holds NaN") as caught:
        judge(ctx, artifact(tmp_path, "calibrated", layers=calibrated.manifest.layers))
    assert caught.value.exit_code == 5 and tmp_path.name in str(caught.value)


# ---------------------------------------------------------------- exported, and with offline features


def test_an_exported_model_has_bytes_and_speed(root: Path, calibrated: Artifact, simulated: Any) -> None:
    from qdm_cli.engine.stages.export import export

    made = context(root, "export-00000000")
    shipped = export(made.recipe.export, calibrated, made)
    result, written = judge(
        context(root, "evaluate-00000007"), artifact(made.payload, "exported", layers=shipped.layers, simulated=shipped.simulated)
    )
    metrics, before = written["metrics"], simulated[2]["metrics"]
    assert not result.simulated and written["note"] is None
    size = sum(path.stat().st_size for path in (made.payload / "unet").glob("*.safetensors")) / 1e6
    assert metrics["size_mb"] == pytest.approx(size) and 0 < metrics["size_vs_fp16"] < 1
    assert metrics["psnr"] == pytest.approx(before["psnr"], abs=0.5), "the simulation promised these images"
    assert metrics["bits_w_mean"] == before["bits_w_mean"] and metrics["bops_g"] == before["bops_g"]
    assert 0 < metrics["latency_p50_ms"] <= metrics["latency_p90_ms"] and metrics["images_per_s"] > 0
    assert metrics["speedup"] == pytest.approx(metrics["latency_base_p50_ms"] / metrics["latency_p50_ms"])
    assert 0 < metrics["memory_weights_mb"] < 2 * metrics["memory_weights_base_mb"]
    rows = {row["name"]: row for row in written["layers"]}
    for row in simulated[2]["layers"]:
        if row["output_error"] is not None:
            assert rows[row["name"]]["weight_sqnr_db"] == pytest.approx(row["weight_sqnr_db"], abs=0.01)
            assert rows[row["name"]]["output_error"] == pytest.approx(row["output_error"], rel=0.05)


def fashion_pipeline(folder: Path) -> Path:
    """A random 32x32 one-channel pipeline in a folder."""
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)
    return folder


def test_offline_features_show_distance_and_floors(root: Path, tmp_path: Path) -> None:
    model = {"id": str(fashion_pipeline(tmp_path / "model"))}
    suites = [{"method": "distribution", "samples": 8, "save_npz": True}]
    ctx = context(root, "evaluate-fashion", {"suites": suites, "fail_if": ["fid[fashion]<10"]}, model=model)
    result, written = judge(ctx, None)
    metrics = written["metrics"]
    assert metrics["fid[fashion]"] > 100 * metrics["fid[fashion]_floor"], "noise is no garment"
    assert metrics["fid[fashion]_floor"] < metrics["fid[fashion]_floor_at_n"] < metrics["fid[fashion]"]
    assert metrics["kid[fashion]"] > 1 and metrics["fid"] is None
    assert "fid" not in {name for name, value in metrics.items() if isinstance(value, float)}
    assert result.gate is None
    extractor = written["protocol"]["distribution"]["extractors"]["fashion-features"]
    assert len(extractor["sha256"]) == 64 and len(extractor["reference_sha256"]) == 64
    assert "floor: real against real" in (ctx.payload / "report.html").read_text()

    import numpy as np

    with np.load(ctx.payload / "samples.npz") as samples:
        assert samples["arr_0"].shape == (8, 32, 32, 1) and samples["arr_0"].dtype == np.uint8


def test_a_folder_is_the_other_side_of_the_comparison(root: Path, tmp_path: Path) -> None:
    folder = fashion_pipeline(tmp_path / "model")
    section = {"suites": ["fidelity"], "samples": 2, "against": str(folder)}
    _, written = judge(context(root, "evaluate-folder", section, model={"id": str(folder)}), None)
    assert written["metrics"]["psnr"] == 100 and written["metrics"]["noise_error"] == 0
    assert written["reference"]["name"] == "model"
