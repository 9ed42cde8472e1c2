"""`qdm diff` over artifacts written by hand: winners by direction, refusals, gates, images, run folders."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qdm_cli import main as cli
from qdm_cli.commands._outputs import OUTPUT
from qdm_cli.engine.artifact import Manifest, digest_of, list_files, write_json, write_manifest
from qdm_cli.engine.caching.schedule import Cut, ModelRef, SamplerRef, schedule_from_refreshes, write_schedule
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation.diff import Difference, compare_paths, layer_changes, metric_rows
from qdm_cli.engine.evaluation.names import METRICS

METRICS_A = {"psnr": 20.0, "ssim": 0.8, "latent_error": 0.2, "lpips": None, "lpips_why": "no weights", "size_mb": 4.0, "macs_g": 1.0}
PROTOCOL = {"common": {"seed": 0, "sampler": {"steps": 20}}, "fidelity": {"n": 8}, "cost": {"device": "cpu"}, "versions": {"torch": "1"}}
LAYER = {"name": "conv", "type": "Conv2d", "shape": [4, 4, 3, 3], "bits_w": 4, "bits_a": 8, "rule": "policy", "bytes": 72}


def publish(folder: Path, stage: str, **manifest: Any) -> Path:
    """Turn what lies in `folder` into an artifact of `stage`."""
    kind = {"evaluate": "evaluated", "export": "exported", "calibrate": "calibrated", "cache": "cached"}[stage]
    files = list_files(folder)
    facts: dict[str, Any] = {"base_model": {"id": "m", "digest": "base"}, "layers": [LAYER], **manifest}
    entry = {"schema": 1, "kind": kind, "stage": stage, "key": "k" * 64, "digest": digest_of(files), "files": files, **facts}
    write_manifest(folder, Manifest.model_validate(entry))
    return folder


Writer = Callable[..., Path]


@pytest.fixture
def evaluation(tmp_path: Path) -> Writer:
    """Writes an evaluated artifact with two 4x4 samples whose pixels are all `pixel`."""

    def write(name: str, *, pixel: int = 0, protocol: dict[str, Any] = PROTOCOL, steps: int = 20, **metrics: float | None) -> Path:
        folder = tmp_path / name
        (folder / "samples").mkdir(parents=True)
        for seed in range(2):
            Image.fromarray(np.full((4, 4), pixel, dtype=np.uint8)).save(folder / "samples" / f"{seed:05d}-exported.png")
            Image.fromarray(np.zeros((4, 4), dtype=np.uint8)).save(folder / "samples" / f"{seed:05d}-base.png")
        (folder / "recipe.resolved.yaml").write_text(json.dumps({"sampler": {"steps": steps}}))
        content = {"subject": {"name": name}, "simulated": False, "metrics": METRICS_A | metrics, "layers": [LAYER], "protocol": protocol}
        write_json(folder / "metrics.json", {"schema": 1, **content, "grid_rows": ["base", "exported", "difference x4"]})
        return publish(folder, "evaluate", primary="metrics.json", metrics=METRICS_A | metrics)

    return write


def winners(found: Difference) -> dict[str, str | None]:
    return {row.name: row.winner for row in found.metrics}


def test_the_winner_follows_the_direction_of_the_metric(evaluation: Writer) -> None:
    found = compare_paths(evaluation("a"), evaluation("b", psnr=25.0, latent_error=0.3, lpips=0.1))
    assert winners(found) == {"psnr": "b", "ssim": "equal", "lpips": None, "latent_error": "a", "size_mb": "equal", "macs_g": None}
    assert found.wins == {"a": 1, "b": 1, "equal": 2}
    (psnr,) = (row for row in found.metrics if row.name == "psnr")
    assert (psnr.change, psnr.ratio, psnr.unit) == (5.0, 1.25, "dB")


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_every_directed_metric_names_the_better_side(better: str) -> None:
    names = [name for name, metric in METRICS.items() if metric.better == better]
    rows = metric_rows(dict.fromkeys(names, 1.0), dict.fromkeys(names, 2.0))
    assert [row.name for row in rows] == names and {row.winner for row in rows} == {"b" if better == "higher" else "a"}


def test_equal_artifacts_do_not_differ(evaluation: Writer) -> None:
    folder = evaluation("a")
    found = compare_paths(folder, folder / "metrics.json")
    assert not found.fields and not found.layers and all(pair.equal for pair in found.images)
    assert found.wins["a"] == found.wins["b"] == 0


def test_settings_layers_and_images_that_differ(evaluation: Writer) -> None:
    found = compare_paths(evaluation("a"), evaluation("b", pixel=16, steps=10))
    assert [(row.field, row.a, row.b) for row in found.fields if row.field.startswith("recipe")] == [("recipe.sampler.steps", 20, 10)]
    assert [pair.image for pair in found.images] == ["00000", "00001"]
    assert found.images[0].psnr_db == pytest.approx(10 * np.log10(255.0**2 / 16**2), rel=1e-12)


def test_layers_are_joined_by_name() -> None:
    other = [{**LAYER, "bits_w": 8}, {**LAYER, "name": "new"}]
    changes = layer_changes([LAYER, {**LAYER, "name": "old"}], other)
    assert [(row.name, row.changes, row.only_in) for row in changes] == [
        ("conv", {"bits_w": [4, 8]}, None),
        ("old", {}, "a"),
        ("new", {}, "b"),
    ]


UNLIKE = {**PROTOCOL, "common": {"seed": 1, "sampler": {"steps": 50}}, "versions": {"torch": "2"}}


def test_unlike_protocols_are_refused_with_every_field(evaluation: Writer) -> None:
    a, b = evaluation("a"), evaluation("b", protocol=UNLIKE)
    with pytest.raises(InputError) as refused:
        compare_paths(a, b)
    lines = [problem.message for problem in refused.value.problems[1:]]
    assert lines == ["common.sampler.steps: 20 in A, 50 in B", "common.seed: 0 in A, 1 in B"]


def test_a_suite_can_be_compared_alone(evaluation: Writer) -> None:
    a, b = evaluation("a"), evaluation("b", protocol={**PROTOCOL, "cost": {"device": "gpu"}}, psnr=1.0)
    with pytest.raises(InputError, match="not comparable"):
        compare_paths(a, b)
    assert set(winners(compare_paths(a, b, suites=["fidelity"]))) == {"psnr", "ssim", "lpips", "latent_error"} - {"lpips"}


def test_no_suite_in_common(evaluation: Writer) -> None:
    a = evaluation("a", protocol={"common": {}, "cost": {}})
    with pytest.raises(InputError, match="no suite in common"):
        compare_paths(a, evaluation("b", protocol={"common": {}, "fidelity": {}}))


def test_other_base_models_have_no_winner(tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        folders.append(publish(tmp_path / name, "export", base_model={"digest": name}, metrics={"denoiser_bytes": ord(name)}))
    found = compare_paths(*folders)
    assert winners(found) == {"denoiser_bytes": None} and "base models differ" in found.notes[0]


def test_models_by_the_numbers_of_their_manifests(tmp_path: Path) -> None:
    for name, count in (("a", 100), ("b", 50)):
        (tmp_path / name).mkdir()
        publish(tmp_path / name, "export", metrics={"denoiser_bytes": count, "verified": True})
    assert winners(compare_paths(tmp_path / "a", tmp_path / "b")) == {"denoiser_bytes": "b"}


def test_cache_schedules_are_compared(tmp_path: Path) -> None:
    times = (9.0, 5.0, 2.0)
    sampler = SamplerRef(class_="S", steps=3, calls=3, timesteps=times, log_snr=times[::-1], step_of_call=(0, 1, 2))
    for name, refreshes in (("a", (0,)), ("b", (0, 2))):
        (tmp_path / name).mkdir()
        cut, model = Cut(id="up1", kind="unet_up", m=1), ModelRef(class_="M", config_sha256="c")
        write_schedule(tmp_path / name, schedule_from_refreshes(refreshes, cuts=[cut], model=model, sampler=sampler))
        publish(tmp_path / name, "cache")
    changed = {change.field: (change.a, change.b) for change in compare_paths(tmp_path / "a", tmp_path / "b").fields}
    assert changed["schedule.mask"] == ("100", "101") and changed["schedule.full_calls"] == (1, 2)
    assert "schedule.cuts.0" not in changed


def test_an_evaluation_is_not_compared_with_a_model(evaluation: Writer, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    with pytest.raises(InputError, match="compare two evaluations or two models"):
        compare_paths(evaluation("a"), publish(tmp_path / "m", "export"))


def test_run_folders_by_their_furthest_common_stage(evaluation: Writer, tmp_path: Path) -> None:
    for run, psnr in (("r1", 20.0), ("r2", 30.0)):
        evaluation(f"{run}/evaluate-01234567", psnr=psnr)
        (tmp_path / run / "export-01234567").mkdir()
        publish(tmp_path / run / "export-01234567", "export", metrics={"denoiser_bytes": psnr})
    found = compare_paths(tmp_path / "r1", tmp_path / "r2")
    assert winners(found)["psnr"] == "b" and found.a.endswith("evaluate-01234567")
    with_export = compare_paths(tmp_path / "r1", tmp_path / "r2" / "export-01234567")
    assert winners(with_export) == {"denoiser_bytes": "a"}


def test_of_several_results_of_a_stage_the_linked_one_counts(evaluation: Writer, tmp_path: Path) -> None:
    evaluation("r/evaluate-00000001", psnr=1.0)
    evaluation("r/evaluate-00000002", psnr=2.0)
    (tmp_path / "r" / "latest-evaluate").symlink_to("evaluate-00000001")
    found = compare_paths(tmp_path / "r", evaluation("b", psnr=1.0))
    assert winners(found)["psnr"] == "equal"


GATES = [
    ("psnr<18", []),
    ("psnr<26", ["psnr<26: psnr is 25"]),
    ("psnr_change<6", ["psnr_change<6: psnr_change is 5"]),
    ("psnr_ratio>=1.25", ["psnr_ratio>=1.25: psnr_ratio is 1.25"]),
    ("layers_changed>0", []),
    ("images_changed>0", ["images_changed>0: images_changed is 2"]),
    ("lpips?>0.1", []),
    ("lpips>0.1", ["lpips>0.1: lpips is null (no weights); write 'lpips?' to ignore that"]),
]


@pytest.mark.parametrize(("condition", "reasons"), GATES, ids=[gate for gate, _ in GATES])
def test_gates(evaluation: Writer, condition: str, reasons: list[str]) -> None:
    found = compare_paths(evaluation("a"), evaluation("b", psnr=25.0, pixel=9), fail_if=[condition])
    assert found.gates == reasons


@pytest.mark.parametrize(("condition", "message"), [("psrn<1", "Did you mean 'psnr'"), ("psnr", "not METRIC OP NUMBER")])
def test_bad_conditions_are_refused(evaluation: Writer, condition: str, message: str) -> None:
    with pytest.raises(InputError) as refused:
        compare_paths(evaluation("a"), evaluation("b"), fail_if=[condition])
    assert message in refused.value.problems[0].message and refused.value.problems[0].path == "--fail-if.0"


@pytest.mark.parametrize("content", ["nothing", "folder"])
def test_paths_that_hold_no_result(tmp_path: Path, evaluation: Writer, content: str) -> None:
    if content == "folder":
        (tmp_path / "x").mkdir()
    with pytest.raises(InputError, match="no such file or folder" if content == "nothing" else "neither an artifact"):
        compare_paths(evaluation("a"), tmp_path / "x")


def test_the_command_prints_its_result_and_exits_5(evaluation: Writer, capfd: pytest.CaptureFixture[str]) -> None:
    a, b = evaluation("a"), evaluation("b", psnr=19.0)
    line = ["diff", str(a), str(b), "--fail-if", "psnr_change<-0.5"]
    assert cli.run([*line, "--format", "json"]) == 5
    data = json.loads(capfd.readouterr().out)
    OUTPUT.validate_python(data)
    assert (data["status"], data["result"]["gates"]) == ("failed", ["psnr_change<-0.5: psnr_change is -1"])
    assert cli.run([*line, "--format", "quiet"]) == 5
    said = capfd.readouterr()
    assert said.out.startswith("B is better in 0 of 4 metrics, A in 1") and said.out.count("\n") == 1
    assert cli.run(line[:3]) == 0
    shown = capfd.readouterr().out
    assert "psnr" in shown and "-1 (-5.0%) dB" in shown


def test_the_command_lists_differing_fields_and_exits_2(evaluation: Writer, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["diff", str(evaluation("a")), str(evaluation("b", protocol=UNLIKE)), "--format", "json"]) == 2
    errors = json.loads(capfd.readouterr().out)["errors"]
    assert [error["path"] for error in errors] == [None, "common.sampler.steps", "common.seed"]
    assert cli.run(["diff", "a", "b", "--suite", "speed"]) == 2
    assert "--suite speed: no such suite" in capfd.readouterr().err
