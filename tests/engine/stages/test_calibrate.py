"""The stage `calibrate` where `quantize.auto` decides the bits: budgets hold to the byte, plan and rules say the same."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdm_cli.engine.errors import InputError, RecipeError
from qdm_cli.engine.plan import make_plan
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.sensitivity import read_sensitivity
from qdm_cli.engine.quant.state import read_state
from qdm_cli.engine.recipe.load import load_recipe
from qdm_cli.engine.run import RunOutcome, run_stage

RECIPE = """
name: auto
model: {id: "tiny:ddpm"}
sampler: {scheduler: DDIMScheduler, steps: 2}
device: {name: cpu}
quantize: {weights: {init: max}, activations: null, policy: edges-w8, auto: {effective_bits: 4.6}}
calibrate: {method: minmax, sensitivity: fast, sensitivity_bits: [2, 4, 8], sensitivity_samples: 1, data: {samples: 1, batch: 1}}
export: {verify: false}
"""


def recipe(folder: Path, *overrides: str) -> Any:
    (folder / "r.yaml").write_text(RECIPE)
    return load_recipe(str(folder / "r.yaml"), list(overrides)).recipe


def calibrate(folder: Path, *overrides: str) -> RunOutcome:
    return run_stage("calibrate", recipe(folder, *overrides), runs_root=folder / "runs")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("auto")
    return folder, calibrate(folder).artifact


def mean_bits(layers: list[dict[str, Any]]) -> float:
    sizes = [(layer, 1) for layer in layers]
    total = bits = 0
    for layer, count in sizes:
        for side in layer["shape"]:
            count *= side
        total, bits = total + count, bits + count * (16 if layer["skipped_why"] else layer["bits_w"])
    return bits / total


def test_the_manifest_has_the_bits_and_the_budget_holds(done: Any) -> None:
    manifest = done[1].manifest
    assert mean_bits(manifest.layers) == pytest.approx(manifest.metrics["auto_used"], abs=1e-9)
    assert 4.3 < manifest.metrics["auto_used"] <= 4.6
    chosen = {layer["rule"]: layer["bits_w"] for layer in manifest.layers if layer["rule"].startswith("quantize.auto")}
    assert set(chosen.values()) == {2, 4, 8} and all(rule == f"quantize.auto: {bits} bits" for rule, bits in chosen.items())
    assert {layer["bits_w"] for layer in manifest.layers if layer["rule"].startswith("policy")} == {8}
    assert manifest.seconds["sensitivity"] > 0


def test_its_plain_rules_decide_the_same(done: Any) -> None:
    from qdm_cli.engine.models import meta_denoiser

    folder, artifact = done
    rules = json.loads(artifact.file("auto.json").read_text())["rules"]
    assert rules == read_sensitivity(artifact.folder).rules and len(rules) == 3
    plain = recipe(folder, "quantize.auto=null", f"quantize.rules={json.dumps(rules)}")
    resolved = {d.name: d.bits_w for d in resolve(meta_denoiser(plain.model)[1], plain.quantize)}
    assert resolved == {layer["name"]: layer["bits_w"] for layer in artifact.manifest.layers}


def test_the_plan_shows_what_the_last_table_gives(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, artifact = done
    monkeypatch.chdir(folder)
    plan = make_plan(recipe(folder))
    assert {row["name"]: row["bits_w"] for row in plan.layers} == {row["name"]: row["bits_w"] for row in artifact.manifest.layers}
    assert "latest-calibrate" in plan.notes[0]
    monkeypatch.chdir(folder.parent)
    assert "when calibrate has measured" in make_plan(recipe(folder)).notes[0]


def test_a_size_holds_to_the_byte(done: Any, tmp_path: Path) -> None:
    table = f"quantize.auto={{max_size: 470kB, table: {done[1].folder}}}"
    overrides = (table, "calibrate.sensitivity=off")
    artifact = calibrate(tmp_path, *overrides).artifact
    exported = run_stage("export", recipe(tmp_path, *overrides), source=artifact, runs_root=tmp_path / "runs").artifact
    assert exported.manifest.metrics["denoiser_bytes"] == artifact.manifest.metrics["auto_used"] <= 470_000
    looser = make_plan(recipe(tmp_path, f"quantize.auto={{max_size: 560kB, table: {done[1].folder}}}"))
    assert 500_000 < looser.total_bytes <= 560_000


REFUSED = [
    ("tiny:ddpm", "effective_bits: 2", "", "cannot come below"),
    ("tiny:ddpm", "max_size: 10kB", "", "takes at least"),
    ("tiny:ddpm", "effective_bits: 4, by: image", "", "no errors of the final image"),
    ("tiny:dit", "effective_bits: 4", "", "is of another model"),
    ("tiny:ddpm", "effective_bits: 4", "quantize.rules=[{match: '*', bits: 8}]", "nothing is left to choose"),
]


@pytest.mark.parametrize(("model", "auto", "rules", "message"), REFUSED, ids=[row[-1] for row in REFUSED])
def test_refusals(done: Any, tmp_path: Path, model: str, auto: str, rules: str, message: str) -> None:
    """The plan decides from the same table as calibrate."""
    table = f"quantize.auto={{{auto}, table: {done[1].folder}}}"
    with pytest.raises(InputError, match=message):
        make_plan(recipe(tmp_path, table, f"model.id={model}", *filter(None, [rules])))


def test_a_table_of_other_weights_is_refused(done: Any, tmp_path: Path) -> None:
    data = json.loads(done[1].file("sensitivity.json").read_text())
    (tmp_path / "t.json").write_text(json.dumps({**data, "model": "other"}))
    with pytest.raises(InputError, match="measured on another model"):
        calibrate(tmp_path, f"quantize.auto={{effective_bits: 4, table: {tmp_path / 't.json'}}}", "calibrate.sensitivity=off")


BAD = [
    (["quantize.auto={effective_bits: 4, max_size: 1MB}"], "and not both"),
    (["quantize.auto={by: output}"], "needs effective_bits or max_size"),
    (["calibrate.sensitivity=off"], "qdm calibrate RECIPE calibrate.sensitivity=fast"),
    (["quantize.auto.by=image"], "needs calibrate.sensitivity end_to_end"),
    (["quantize.auto={max_size: 1MB}", "export.target=dequantized"], "has no effect with export.target dequantized"),
]


@pytest.mark.parametrize(("overrides", "message"), BAD, ids=[message for _, message in BAD])
def test_settings_that_do_not_go_together(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe(tmp_path, *overrides)
    assert message in str(refused.value)


def test_another_table_is_another_result(done: Any, tmp_path: Path) -> None:
    table = tmp_path / "t.json"
    table.write_text(done[1].file("sensitivity.json").read_text())
    overrides = (f"quantize.auto={{effective_bits: 5, table: {table}}}", "calibrate.sensitivity=off")
    first = calibrate(tmp_path, *overrides)
    assert calibrate(tmp_path, *overrides).status == "cached"
    table.write_text(table.read_text().replace('"schema": 1', '"schema":  1'))
    assert calibrate(tmp_path, *overrides).artifact.manifest.key != first.artifact.manifest.key


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
from qdm_cli.engine import methods
methods.METHODS["calibrate"]["toy"] = "toy_method:ToyConfig"
from qdm_cli.main import run
sys.exit(run(["calibrate", sys.argv[2], "--out", sys.argv[3], "--offline"]))
"""


def test_a_method_is_its_module_and_one_line_of_the_table(tmp_path: Path) -> None:
    """Schema, defaults and the stage follow from the config class: nothing else of the house is edited."""
    text = RECIPE.replace(
        "method: minmax, sensitivity: fast, sensitivity_bits: [2, 4, 8], sensitivity_samples: 1", "method: toy, shrink: 0.5"
    )
    (tmp_path / "r.yaml").write_text(text.replace(", auto: {effective_bits: 4.6}", ""))
    fakes = Path(__file__).parents[2] / "fakes"
    out = tmp_path / "out"
    child = subprocess.run([sys.executable, "-c", CHILD, str(fakes), str(tmp_path / "r.yaml"), str(out)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert any(layer.decision.bits_w == 4 for layer in read_state(out).layers.values())


GROUPS = "quantize={weights: {init: max}, activations: {bits: 8, timestep_aware: true}, policy: edges-w8}"


@pytest.mark.parametrize("method", ["uniform", "optimal_denoiser", "model_x0"])
def test_scales_per_group_of_timesteps(tmp_path: Path, method: str) -> None:
    groups = f"calibrate.timestep_groups={{method: {method}, k: 2, samples: 4}}"
    given = ("sampler.steps=4", GROUPS, "calibrate.data.samples=4", "calibrate.data.batch=2", "calibrate.sensitivity=off", groups)
    state = read_state(calibrate(tmp_path, *given).artifact.folder)
    assert state.row_mode == "interval" and len(state.step_keys) == 2 and float(state.step_keys[0]) == 0
    rows = {layer.act_scale.shape[0] for layer in state.layers.values() if layer.decision.timestep_aware}
    assert rows == {2}
    assert make_plan(recipe(tmp_path, *given)).rows == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((), "needs quantize.activations.timestep_aware"),
        ((GROUPS, "sampler.steps=1"), r"is larger than sampler\.steps \(1\)"),
    ],
    ids=["nothing per step", "more groups than steps"],
)
def test_groups_that_cannot_be(tmp_path: Path, settings: tuple[str, ...], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        recipe(tmp_path, *settings, "calibrate.sensitivity=off", "quantize.auto=null", "calibrate.timestep_groups={k: 2}")
    assert any(re.search(message, problem.message) for problem in caught.value.problems)
