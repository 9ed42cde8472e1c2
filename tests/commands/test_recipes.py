"""`qdm ls`, `cp`, `schema` and `validate`."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from qdm_cli.engine.recipe import load_recipe
from qdm_cli.engine.recipe.bundled import bundled, bundled_names, bundled_text, parse_header
from qdm_cli.engine.recipe.copy import copied_text, full_text
from qdm_cli.engine.recipe.fields import catalogue
from qdm_cli.main import run

GOOD = "model: {id: tiny:ddpm}\nexport: {}\n"
BAD = "model: {id: tiny:ddpm}\nseeed: 1\n"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run(argv)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def recipes(tmp_cwd: Path) -> Path:
    (tmp_cwd / "good.yaml").write_text(GOOD)
    (tmp_cwd / "bad.yaml").write_text(BAD)
    return tmp_cwd


class TestBundled:
    def test_every_one_is_valid_and_says_what_it_is(self) -> None:
        found = bundled()
        assert len(found) >= 8
        for recipe in found:
            assert load_recipe(recipe.name).recipe.model.id
            assert recipe.what.endswith(".")
            assert recipe.run.startswith(f"qdm run {recipe.name}")
            assert recipe.override.startswith(f"qdm run {recipe.name} ")
            assert recipe.family and recipe.method and recipe.bits and recipe.gpu

    def test_the_command_in_the_header_loads(self) -> None:
        for recipe in bundled():
            for command in (recipe.run, recipe.override):
                _, _, name, *overrides = command.split()
                load_recipe(name, overrides)

    def test_the_header_says_the_bits_of_the_recipe(self) -> None:
        for recipe in bundled():
            loaded = load_recipe(recipe.name).recipe
            policy = loaded.quantize
            # 16 = float activations
            activations = 16 if policy.activations is None else policy.activations.bits
            quantized = (loaded.calibrate is not None or loaded.finetune is not None) and recipe.method != "full"
            assert recipe.bits == (f"W{policy.weights.bits}A{activations}" if quantized else "full precision")

    def test_a_header_is_read_up_to_the_first_setting(self) -> None:
        text = "# yaml-language-server: $schema=x\n# What it is.\n#\n# run: qdm run x\n# quality: 30 dB\nversion: 1\n# family: not this\n"
        found = parse_header("x", text)
        assert (found.what, found.run, found.quality, found.family) == ("What it is.", "qdm run x", "30 dB", "")


class TestLs:
    def test_names_for_people_and_programs(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "ls")
        assert code == 0
        assert all(name in out for name in bundled_names())
        code, out, _ = printed(capsys, "ls", "--format", "json")
        rows = json.loads(out)["result"]
        assert [row["name"] for row in rows] == bundled_names()
        assert next(row for row in rows if row["name"] == "quickstart")["bits"] == "W4A4"


class TestCp:
    def test_a_copy_is_the_same_text(self, tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "cp", "quickstart")
        assert (code, out) == (0, f"{tmp_cwd / 'quickstart.yaml'}\n")
        assert (tmp_cwd / "quickstart.yaml").read_text() == bundled_text("quickstart")

    def test_into_a_folder_and_to_a_new_name(self, tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_cwd / "folder").mkdir()
        assert printed(capsys, "cp", "quickstart", "folder")[0] == 0
        assert printed(capsys, "cp", "quickstart", "new/mine.yaml")[0] == 0
        assert load_recipe("folder/quickstart.yaml").recipe == load_recipe("new/mine.yaml").recipe

    def test_nothing_is_overwritten_without_yes(self, tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_cwd / "quickstart.yaml"
        path.write_text("mine")
        code, out, err = printed(capsys, "cp", "quickstart")
        assert (code, out) == (2, "")
        assert "--yes" in err
        assert path.read_text() == "mine"
        assert printed(capsys, "cp", "quickstart", "--yes")[0] == 0
        assert path.read_text() == bundled_text("quickstart")

    def test_an_unknown_name_is_suggested(self, tmp_cwd: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = printed(capsys, "cp", "quickstrat")
        assert code == 2
        assert "Did you mean 'quickstart'?" in err
        assert not list(tmp_cwd.iterdir())

    @pytest.mark.parametrize("name", bundled_names())
    def test_full_means_the_same_and_keeps_comments(self, name: str) -> None:
        text = copied_text(name, full=True)
        assert load_recipe("-", stdin=io.StringIO(text)).recipe == load_recipe(name).recipe
        assert "extends" not in text
        comments = [line.strip() for line in bundled_text(name).splitlines() if line.startswith("#")]
        assert comments
        assert all(comment in text for comment in comments)
        assert "component_only: false" in text

    def test_full_leaves_absent_stages_out(self) -> None:
        text = full_text(bundled_text("w8a8-ptq"), "w8a8-ptq")
        assert "finetune" not in text
        assert "guidance: null" in text


class TestSchema:
    def test_the_recipe_schema_accepts_what_the_loader_accepts(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "schema")
        schema = json.loads(out)
        assert code == 0
        assert schema["additionalProperties"] is False
        assert "extends" in schema["properties"]
        assert schema["properties"]["seed"]["description"] == "Seed of everything random."
        assert {"type": "string"} in schema["$defs"]["DeviceSpec"]["properties"]["max_cpu"]["anyOf"]
        assert "fidelity" in schema["$defs"]["EvaluateSpec"]["properties"]["suites"]["items"]["anyOf"][1]["enum"]
        assert printed(capsys, "schema", "--format", "json")[1].strip() == json.dumps(schema)

    def test_manifest_and_metrics(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert "digest" in json.loads(printed(capsys, "schema", "manifest")[1])["properties"]
        assert "metrics" in json.loads(printed(capsys, "schema", "metrics")[1])["properties"]

    def test_one_setting(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "schema", "sampler.steps")
        assert (code, out.splitlines()) == (
            0,
            ["sampler.steps", "  Denoising steps.", "  type: a whole number, at least 1, at most 1000", "  default: 20"],
        )

    @pytest.mark.parametrize("name", ["quantize.rules.bits", "quantize.rules.0.bits", "quantize.rules.N.bits"])
    def test_list_indices_may_be_left_out(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert printed(capsys, "schema", name)[1].startswith("quantize.rules.N.bits\n")

    def test_a_bare_name_shows_all_of_that_name(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = printed(capsys, "schema", "samples")[1]
        assert "calibrate.data.samples (method mse)" in out
        assert "evaluate.samples" in out

    def test_a_section_lists_its_settings(self, capsys: pytest.CaptureFixture[str]) -> None:
        out = printed(capsys, "schema", "model")[1]
        assert "default: none, it must be given" in out
        assert "  revision   Hub revision" in out

    def test_a_misspelt_setting(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = printed(capsys, "schema", "finetune.rnk")
        assert (code, out) == (2, "")
        assert "Did you mean 'finetune.rank'?" in err

    def test_every_setting_has_a_description(self) -> None:
        assert [item.path for item in catalogue() if not item.text and item.name != "method"] == []


class TestValidate:
    def test_valid_recipes(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "validate", "good.yaml", "quickstart")
        assert code == 0
        assert out.splitlines()[0] == "good.yaml: valid (export)"
        assert out.splitlines()[1].startswith("quickstart: valid (calibrate, finetune, cache, export, evaluate)")

    def test_all_problems_of_all_recipes(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = printed(capsys, "validate", "bad.yaml", "good.yaml", "nothing.yaml")
        assert (code, out) == (2, "")
        assert "bad.yaml:2:1  seeed: unknown setting. Did you mean 'seed'?" in err
        assert "nothing.yaml  there is no file nothing.yaml" in err
        assert "2 problems. Nothing was run. (exit 2)" in err

    def test_json(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "validate", "bad.yaml", "--format", "json")
        found = json.loads(out)
        assert (code, found["status"], found["exit_code"]) == (2, "error", 2)
        assert found["errors"][0] == {
            "where": "bad.yaml:2:1",
            "path": "seeed",
            "message": "unknown setting. Did you mean 'seed'?",
            "hint": "seed",
        }

    def test_annotations_for_github(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        err = printed(capsys, "validate", "bad.yaml", "nothing.yaml", "--github")[2]
        assert "::error file=bad.yaml,line=2,col=1::seeed: unknown setting" in err
        assert "::error file=nothing.yaml::there is no file" in err
        assert "::error" not in printed(capsys, "validate", "bad.yaml")[2]

    def test_strict_model_matches_every_rule(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = printed(capsys, "validate", "good.yaml", "--strict-model", "--format", "json")
        assert code == 0
        assert json.loads(out)["result"][0]["layers"]["quantize"] > 10
        (recipes / "good.yaml").write_text(GOOD + "quantize:\n  rules:\n    - {match: nothing.*, bits: 8}\n")
        code, _, err = printed(capsys, "validate", "good.yaml", "--strict-model")
        assert code == 2
        assert "good.yaml:5:8  quantize.rules.0.match: 'nothing.*' matches no layer" in err

    def test_strict_model_without_the_model(self, recipes: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (recipes / "good.yaml").write_text("model: {id: nowhere/nothing}\n")
        code, _, err = printed(capsys, "validate", "good.yaml", "--strict-model", "--offline")
        assert code == 3
        assert "nowhere/nothing" in err


def test_none_of_them_imports_torch(tmp_path: Path) -> None:
    """Nor diffusers, which takes seconds."""
    (tmp_path / "good.yaml").write_text(GOOD)
    for argv in (["ls"], ["cp", "quickstart"], ["schema"], ["schema", "rank"], ["validate", "good.yaml", "efficientdm-w4a4"]):
        code = f"import sys; from qdm_cli.main import run; print(run({argv!r}), [m for m in ('torch', 'diffusers') if m in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=250)
        assert done.stdout.splitlines()[-1] == "0 []", (argv, done.stdout[-300:], done.stderr[-300:])
