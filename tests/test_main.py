"""The command line inside this process: options, exit codes, help, JSON, with fake stages."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdm_cli import main as cli
from qdm_cli.commands._common import GLOBALS, make_session, merged_globals
from qdm_cli.commands._outputs import OUTPUT
from qdm_cli.commands._stages import path_from
from qdm_cli.engine.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
FAKES = ROOT / "tests" / "fakes"
ENGINE: dict[str, Any] = {
    "stages": {name: f"fake_stages:{name}" for name in ("calibrate", "finetune", "export", "evaluate")},
    "base_digest": "fake_stages:base_digest",
}
RECIPE = """
model: {id: "tiny:ddpm"}
sampler: {steps: 5}
device: {name: cpu}
calibrate: {method: mse}
finetune: {method: efficientdm, iterations: 10}
export: {}
evaluate: {samples: 2}
"""


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        assert self.out.count("\n") == 1, "JSON mode prints one object on one line"
        value: dict[str, Any] = json.loads(self.out)
        OUTPUT.validate_python(value)
        return value


@pytest.fixture
def qdm(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    """Runs a command line in an empty folder that holds r.yaml; what it wrote on descriptors 1 and 2 comes back."""
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_TRACE", str(tmp_cwd / "trace"))
    (tmp_cwd / "r.yaml").write_text(RECIPE)

    def call(line: str | Sequence[str]) -> Said:
        capfd.readouterr()
        code = cli.run(shlex.split(line) if isinstance(line, str) else line, engine=ENGINE)
        captured = capfd.readouterr()
        return Said(code, captured.out, captured.err)

    return call


# --- results


def test_a_stage_prints_its_folder_and_nothing_else(qdm: Callable[..., Said], tmp_cwd: Path) -> None:
    said = qdm("calibrate r.yaml")
    (folder,) = (tmp_cwd / "runs" / "r").glob("calibrate-????????")
    assert (said.code, said.out) == (0, f"{folder}\n")
    assert "calibrate 6/6" in said.err
    again = qdm("calibrate r.yaml")
    assert (again.code, again.out) == (0, said.out)
    assert "already done" in again.err


def test_json_is_one_object(qdm: Callable[..., Said]) -> None:
    done, cached = qdm("calibrate r.yaml --format json").json, qdm("calibrate r.yaml --format json").json
    assert (done["schema"], done["command"], done["status"], cached["status"]) == (1, "calibrate", "done", "cached")
    assert Path(done["manifest"]) == Path(done["artifact"]) / "qdm.json"
    assert json.loads(Path(done["manifest"]).read_text())["digest"] == done["digest"]
    assert done["metrics"] == {"units": 6}
    assert done["warnings"] == [] and done["seconds"] >= 0


def test_quiet_leaves_stderr_empty(qdm: Callable[..., Said]) -> None:
    said = qdm("calibrate r.yaml --format quiet")
    assert said.err == "" and said.out.count("\n") == 1


def test_evaluate_prints_its_metrics_file(qdm: Callable[..., Said]) -> None:
    path = qdm("run r.yaml").out
    assert Path(path.strip()).name.startswith("export-")
    metrics = qdm("evaluate r.yaml").out.strip()
    assert json.loads(Path(metrics).read_text()) == {"psnr": 21.5}


def test_run_reports_every_stage_in_json(qdm: Callable[..., Said]) -> None:
    qdm("calibrate r.yaml")
    data = qdm("run r.yaml --format json").json
    assert [(s["stage"], s["status"]) for s in data["stages"]] == [
        ("calibrate", "cached"),
        ("finetune", "done"),
        ("export", "done"),
        ("evaluate", "done"),
    ]
    assert data["artifact"] == data["stages"][2]["artifact"]
    assert data["metrics"] == {"units": 6, "psnr": 21.5, "fid": None}
    assert qdm("run r.yaml --format json").json["status"] == "cached"


def test_chained_recipes_feed_each_other(qdm: Callable[..., Said], tmp_cwd: Path) -> None:
    first, second = RECIPE.split("finetune")[0], "finetune".join(["", RECIPE.split("finetune", 1)[1]]).replace("evaluate: {samples: 2}", "")
    head = "".join(line + "\n" for line in RECIPE.splitlines()[1:4])
    (tmp_cwd / "one.yaml").write_text(first)
    (tmp_cwd / "two.yaml").write_text(head + second)
    data = qdm("run one.yaml two.yaml --format json").json
    assert [s["stage"] for s in data["stages"]] == ["calibrate", "finetune", "export"]
    manifest = json.loads(Path(data["manifest"]).read_text())
    assert Path(data["artifact"]).parent.name == "two"
    assert manifest["parents"][-1]["path"] == data["stages"][0]["artifact"]


def test_out_and_from(qdm: Callable[..., Said], tmp_cwd: Path) -> None:
    assert qdm("calibrate r.yaml --out first").out == f"{tmp_cwd / 'first'}\n"
    said = qdm("finetune r.yaml --from first/qdm.json --out second")
    assert said.out == f"{tmp_cwd / 'second'}\n"
    assert not (tmp_cwd / "runs").exists()


@pytest.mark.parametrize("override", ["sampler.steps=9", "-s sampler.steps=9", "--set sampler.steps=9"])
def test_overrides_reach_the_recipe(qdm: Callable[..., Said], override: str) -> None:
    data = qdm(f"calibrate r.yaml {override} --format json").json
    assert json.loads(Path(data["manifest"]).read_text())["sampler"]["steps"] == 9


def test_seed_overrides_the_recipe(qdm: Callable[..., Said]) -> None:
    data = qdm("calibrate r.yaml --seed 7 --format json").json
    assert json.loads(Path(data["manifest"]).read_text())["seeds"] == {"recipe": 7}


def test_smoke_writes_beside_the_real_run(qdm: Callable[..., Said], tmp_cwd: Path) -> None:
    said = qdm("run r.yaml --smoke")
    assert said.code == 0
    assert Path(said.out.strip()).parent == tmp_cwd / "runs" / "r-smoke"


@pytest.mark.parametrize("stage", ["calibrate", "run"])
@pytest.mark.filterwarnings("ignore:some library")
def test_library_chatter_never_reaches_stdout(qdm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    monkeypatch.setenv("FAKE_FAIL", "calibrate:noise")
    said = qdm(f"{stage} r.yaml")
    assert said.out.count("\n") == 1 and "chatter o" not in said.out
    assert "library chatter on stdout" in said.err and "chatter of a child process" in said.err


@pytest.mark.filterwarnings("ignore:some library")
def test_verbose_shows_what_libraries_log(qdm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "calibrate:noise")
    assert "some library is glad" in qdm("calibrate r.yaml -v").err
    assert "some library is glad" not in qdm("calibrate r.yaml --fresh").err


# --- exit codes


@pytest.mark.parametrize(
    ("kind", "code", "message"),
    [
        ("value", 1, "calibrate failed: ValueError: the widget is blue (traceback in"),
        ("package", 3, "pip install tensorboard_that_is_not_there"),
        ("disk", 3, "disk full while writing"),
        ("memory", 4, "lower calibrate.data.batch (now 16)"),
        ("gate", 5, "not finite at update 3"),
    ],
)
@pytest.mark.parametrize("form", ["human", "json"])
def test_exit_codes_of_failing_stages(
    qdm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch, kind: str, code: int, message: str, form: str
) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"calibrate:{kind}")
    said = qdm(f"run r.yaml --format {form}")
    assert said.code == code
    assert message in said.err
    if form == "human":
        assert said.out == ""
        assert "Traceback" not in said.err
    else:
        assert (said.json["status"], said.json["exit_code"], said.json["command"]) == ("error", code, "run")
        assert message in said.json["errors"][0]["message"]


def test_debug_shows_the_traceback(qdm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "calibrate:value")
    assert "Traceback (most recent call last)" in qdm("calibrate r.yaml --debug").err


def test_a_failed_gate_prints_its_result_and_exits_5(qdm: Callable[..., Said]) -> None:
    for _ in ("done", "cached"):
        said = qdm(["run", "r.yaml", "evaluate.fail_if=[psnr<30]"])
        assert said.code == 5 and Path(said.out.strip()).is_dir()
        assert "psnr<30 (21.5)" in said.err
    data = qdm(["evaluate", "r.yaml", "evaluate.fail_if=[psnr<30]", "--format", "json"])
    assert (data.code, data.json["status"], data.json["exit_code"]) == (5, "failed", 5)
    assert data.json["metrics"]["psnr"] == 21.5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "no command given"),
        ("calibrat r.yaml", "Did you mean 'calibrate'"),
        ("calibrate", "missing argument 'RECIPE'"),
        ("calibrate nothing.yaml", "there is no file nothing.yaml"),
        ("calibrate r.yaml --steps 5", "did you mean sampler.steps=5?"),
        ("calibrate r.yaml --steps=5", "did you mean sampler.steps=5?"),
        ("calibrate r.yaml --batch-size 8", ".batch_size=8?"),
        ("calibrate r.yaml --format xml", "--format: 'xml' is not human or json or quiet"),
        ("calibrate r.yaml --seed x", "--seed: 'x' is not a whole number"),
        ("calibrate r.yaml --offload disk", "--offload: 'disk' is not none or model or group"),
        ("calibrate r.yaml --device gpu", "device 'gpu' is not one of"),
        ("calibrate r.yaml sampler.stepps=3", "override 1"),
        ("calibrate r.yaml -- --num_processes 4", "nothing may follow --"),
        ("finetune r.yaml", "Run: qdm calibrate r.yaml"),
        ("finetune r.yaml --from nowhere", "nowhere: no such artifact"),
        ("finetune - --from -", "cannot both be read from stdin"),
        ("run --smoke", "missing argument"),
        ("run a=b", "which recipe?"),
        ("run r.yaml r.yaml --out x", "--out takes one recipe"),
        ("inspect nowhere", "nowhere: no such artifact"),
    ],
)
def test_wrong_usage_exits_2_and_runs_nothing(qdm: Callable[..., Said], tmp_cwd: Path, line: str, message: str) -> None:
    said = qdm(line)
    assert (said.code, said.out) == (2, "")
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_cwd / "trace").exists()


@pytest.mark.parametrize(
    "line", ["--format json", "calibrate --format json", "calibrate r.yaml --format=json --bogus", "--format json bogus"]
)
def test_wrong_usage_is_one_object_in_json_mode(qdm: Callable[..., Said], line: str) -> None:
    said = qdm(line)
    assert said.code == 2
    assert (said.json["status"], said.json["exit_code"]) == ("error", 2)
    assert said.json["errors"][0]["message"]


def test_all_problems_of_a_recipe_are_shown_with_positions(qdm: Callable[..., Said], tmp_cwd: Path) -> None:
    (tmp_cwd / "r.yaml").write_text(RECIPE.replace("steps: 5", "stepps: 5").replace("method: mse", "method: mze"))
    said = qdm("calibrate r.yaml")
    assert said.code == 2
    lines = said.err.splitlines()
    assert lines[0].startswith("r.yaml:3:11  sampler.stepps: ") and "'steps'" in lines[0]
    assert lines[1].startswith("r.yaml:5:") and "'mse'" in lines[1]
    assert lines[2] == "2 problems. Nothing was run. (exit 2)"
    errors = qdm("calibrate r.yaml --format json").json["errors"]
    assert [error["path"] for error in errors] == ["sampler.stepps", "calibrate.method"]
    assert errors[0]["where"] == "r.yaml:3:11"


# --- global options


@pytest.mark.parametrize("line", ["--format json calibrate r.yaml", "calibrate --format json r.yaml", "calibrate r.yaml --format json"])
def test_global_options_stand_before_or_after_the_command(qdm: Callable[..., Said], line: str) -> None:
    assert qdm(line).json["status"] == "done"


def test_every_global_option_has_an_environment_mirror() -> None:
    texts = {bool: "1", int: "3", str: "auto"}
    for option in GLOBALS:
        text = option.choices[-1] if option.choices else texts[option.type]
        values = merged_globals({}, {}, {f"QDM_{option.name.upper()}": text})
        assert values[option.name] == option.parse(text, "")


def test_the_nearer_option_wins() -> None:
    environ = {"QDM_DEVICE": "cuda:1", "QDM_SEED": "1"}
    assert merged_globals({"device": "cuda:2"}, {"device": "cpu"}, environ)["device"] == "cpu"
    assert merged_globals({"device": "cuda:2"}, {"device": None}, environ)["device"] == "cuda:2"
    assert merged_globals({"device": None}, {}, environ) == {"device": "cuda:1", "seed": 1}


@pytest.mark.parametrize(
    ("environ", "offline"), [({}, False), ({"HF_HUB_OFFLINE": "1"}, True), ({"QDM_OFFLINE": "0"}, False), ({"QDM_OFFLINE": "yes"}, True)]
)
def test_offline_follows_the_hub(environ: dict[str, str], offline: bool) -> None:
    assert make_session(merged_globals({}, {}, environ)).offline is offline


def test_a_wrong_environment_value_is_named(qdm: Callable[..., Said], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QDM_SMOKE", "maybe")
    said = qdm("calibrate r.yaml")
    assert said.code == 2 and "QDM_SMOKE: 'maybe' is not true or false" in said.err


# --- help


@pytest.mark.parametrize("command", ["", *cli.COMMANDS])
def test_every_help_ends_with_two_runnable_examples(qdm: Callable[..., Said], command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    said = qdm(f"{command} --help")
    assert said.code == 0 and said.err == ""
    examples = [line.strip() for line in said.out.split("Examples:")[1].splitlines() if line.strip().startswith("qdm ")]
    assert len(examples) == 2
    for example in examples:
        for step in example.split(" > ")[0].split(" | "):
            assert step.split()[1] in cli.COMMANDS
            assert parses(step), step
    for section in ("Args:", "Raises:", "Returns:"):
        assert section not in said.out


def parses(line: str) -> bool:
    """The command line is understood; nothing is executed."""
    call = cli.typer.main.get_command(cli.app).main(
        args=shlex.split(line)[1:], prog_name="qdm", standalone_mode=False, obj=cli.Root((), {}, {})
    )
    return isinstance(call, cli.Call)


def test_the_bare_command_shows_three_lines_to_copy(qdm: Callable[..., Said]) -> None:
    said = qdm("")
    lines = [line.strip() for line in said.err.splitlines()]
    assert sum(line.startswith("qdm ") for line in lines) == 3


def test_version(qdm: Callable[..., Said]) -> None:
    assert qdm("--version").out.startswith("qdm 0.")


def test_help_imports_no_heavy_module() -> None:
    code = "import sys; from qdm_cli.main import run; run(sys.argv[1:]); print(*sorted(sys.modules), file=sys.stderr)"
    for line in (["--help"], ["ls"], ["schema"], ["validate", "quickstart"]):
        done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=ROOT, check=True)
        loaded = set(done.stderr.splitlines()[-1].split())
        assert done.stdout
        assert not loaded & {"torch", "diffusers", "transformers", "numpy", "accelerate"}
    assert "pydantic" in loaded


@pytest.mark.parametrize(
    "line", ["ls", "validate r.yaml", "schema sampler.steps", "env", "plan r.yaml", "calibrate r.yaml --dry-run", "cp quickstart"]
)
def test_every_command_prints_what_the_output_schema_says(qdm: Callable[..., Said], line: str) -> None:
    said = qdm(f"{line} --format json")
    assert said.code == 0, said.err
    assert said.json["command"] == line.split()[0]
    assert qdm("schema output --format json").code == 0


# --- inspect


def test_inspect_checks_and_describes(qdm: Callable[..., Said]) -> None:
    folder = qdm("calibrate r.yaml").out.strip()
    said = qdm(f"inspect {folder} --layers")
    assert said.code == 0 and "calibrated" in said.out and "steps=5" in said.out
    data = qdm(f"inspect {folder} --format json").json
    assert (data["command"], data["status"], data["result"]["kind"]) == ("inspect", "done", "calibrated")
    Path(folder, "result.json").write_text("[]")
    assert qdm(f"inspect {folder}").code == 2


# --- what the previous step printed


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("/a/b\n", "/a/b"),
        ("noise\n/a b/c\n\n", "/a b/c"),
        ('{"artifact": "/a/b", "status": "done"}\n', "/a/b"),
        ('noise\n{"artifact": "/a/b"}\n', "/a/b"),
        ('{\n  "artifact": "/a/b"\n}\n', "/a/b"),
    ],
)
def test_the_path_of_the_step_before(text: str, path: str) -> None:
    assert path_from(text) == path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the previous step produced nothing"),
        ("\n \n", "the previous step produced nothing"),
        ('{"status": "error", "errors": [{"message": "boom"}]}', "the previous step produced nothing: boom"),
        ("{broken", "neither a path nor a JSON object"),
    ],
)
def test_a_step_that_failed_before(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        path_from(text)


def test_the_process_environment_is_not_changed_by_usage_errors(qdm: Callable[..., Said]) -> None:
    before = dict(os.environ)
    qdm("bogus")
    assert dict(os.environ) == before
