"""Running stages: keys, cached results, implied inputs, resume, publication, and what is left behind when something breaks."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qdm_cli.engine.artifact import open_artifact
from qdm_cli.engine.context import Silent
from qdm_cli.engine.errors import EnvironmentProblem, GateFailed, InputError, OutOfMemory
from qdm_cli.engine.recipe import Recipe
from qdm_cli.engine.run import Options, StageFailed, Terminated, run_recipe, run_stage, smoke_recipe
from qdm_cli.engine.run.failure import is_out_of_memory, missing_package
from qdm_cli.engine.run.folder import stage_folder, storage_problem
from qdm_cli.engine.run.host import resolve_device
from qdm_cli.engine.run.keys import stage_key
from qdm_cli.engine.run.stage import Run

ROOT = Path(__file__).resolve().parents[2]
FAKES = ROOT / "tests" / "fakes"
ENGINE: dict[str, Any] = {
    "stages": {name: f"fake_stages:{name}" for name in ("calibrate", "finetune", "export", "evaluate")},
    "base_digest": "fake_stages:base_digest",
    "device": "cpu",
}


@pytest.fixture(autouse=True)
def fakes(tmp_cwd: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(FAKES))
    monkeypatch.setenv("FAKE_TRACE", str(tmp_cwd / "trace"))
    return tmp_cwd


def recipe(**changes: Any) -> Recipe:
    stages = {"calibrate": {"method": "mse"}, "finetune": {"method": "efficientdm", "iterations": 10}, "export": {}, "evaluate": {}}
    facts = {"name": "r", "model": {"id": "tiny:ddpm"}, "sampler": {"steps": 5}, **stages}
    return Recipe.model_validate({**facts, **changes})


def trace() -> list[str]:
    path = Path("trace")
    return path.read_text().split("\n")[:-1] if path.exists() else []


def key(changed: Recipe, stage: str = "finetune", **facts: Any) -> str:
    return stage_key(stage, changed, **{"parent": "p", "base_model": "b", "version": "0.1.0", **facts})


# --- keys


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"device": {"name": "cuda", "threads": 3}},
        {"evaluate": {"samples": 5}},
        {"export": None},
        {"finetune": {"method": "efficientdm", "iterations": 10, "checkpoint_every": 1}},
    ],
    ids=["name", "device", "evaluate", "export", "logging"],
)
def test_what_changes_no_result_changes_no_key(changes: dict[str, Any]) -> None:
    assert key(recipe(**changes)) == key(recipe())


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"sampler": {"steps": 6}},
        {"model": {"id": "tiny:ddpm", "dtype": "float16"}},
        {"quantize": {"weights": {"bits": 3}}},
        {"finetune": {"method": "efficientdm", "iterations": 11}},
    ],
    ids=["seed", "sampler", "model", "quantize", "own section"],
)
def test_what_changes_the_result_changes_the_key(changes: dict[str, Any]) -> None:
    assert key(recipe(**changes)) != key(recipe())


@pytest.mark.parametrize(
    "facts", [{"parent": "q"}, {"base_model": "c"}, {"version": "0.2.0"}, {"smoke": True}], ids=lambda facts: next(iter(facts))
)
def test_the_key_holds_parent_base_model_and_version(facts: dict[str, Any]) -> None:
    assert key(recipe(), **facts) != key(recipe())


def test_a_patch_release_keeps_results() -> None:
    assert key(recipe(), version="0.1.7") == key(recipe())


def test_a_model_folder_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    keys = {key(recipe(model={"id": str(tmp_path / name)})) for name in ("a", "b")}
    assert len(keys) == 1


# --- one stage


def test_a_stage_publishes_a_described_folder() -> None:
    outcome = run_stage("calibrate", recipe(), command=("qdm", "calibrate"), recipe_text="model: {}  # mine\n", **ENGINE)
    folder = outcome.artifact.folder
    manifest = open_artifact(folder, full=True).manifest
    assert outcome.status == "done"
    assert folder == Path("runs/r").resolve() / f"calibrate-{manifest.key[:8]}"
    assert (manifest.kind, manifest.stage, manifest.command) == ("calibrated", "calibrate", ["qdm", "calibrate"])
    assert manifest.base_model["id"] == "fake" and len(manifest.base_model["digest"]) == 64
    assert manifest.sampler["steps"] == 5
    assert manifest.peak_bytes["cpu"] > 10e6
    assert manifest.seconds["total"] > 0
    assert manifest.environment["device"] == "cpu"
    assert (folder / "recipe.yaml").read_text() == "model: {}  # mine\n"
    assert Recipe.model_validate(json.loads((folder / "recipe.resolved.yaml").read_text())) == recipe()
    assert "calibrate 6/6 fake" in (folder / "run.log").read_text()
    assert not folder.with_name(folder.name + ".partial").exists()
    assert Path("runs/r/latest-calibrate").resolve() == folder


def test_a_finished_key_is_cached_and_fresh_redoes_it() -> None:
    first = run_stage("calibrate", recipe(), **ENGINE)
    assert len(trace()) == 6
    second = run_stage("calibrate", recipe(), **ENGINE)
    assert (second.status, second.artifact.folder, len(trace())) == ("cached", first.artifact.folder, 6)
    third = run_stage("calibrate", recipe(), fresh=True, **ENGINE)
    assert (third.status, len(trace())) == ("done", 12)
    assert third.artifact.manifest.digest == first.artifact.manifest.digest


def test_a_damaged_result_is_made_again() -> None:
    first = run_stage("calibrate", recipe(), **ENGINE)
    (first.artifact.folder / "result.json").write_text("[]")
    again = run_stage("calibrate", recipe(), **ENGINE)
    assert again.status == "done"
    assert again.artifact.manifest.digest == first.artifact.manifest.digest


def test_the_stage_must_be_in_the_recipe() -> None:
    with pytest.raises(InputError, match="no section finetune"):
        run_stage("finetune", recipe(finetune=None), source=run_stage("calibrate", recipe(), **ENGINE).artifact, **ENGINE)


def test_cached_stages_do_not_need_the_device() -> None:
    run_stage("calibrate", recipe(), **ENGINE)
    assert run_stage("calibrate", recipe(), **{**ENGINE, "device": "cuda:99"}).status == "cached"


# --- inputs


def test_the_implied_predecessor_is_taken() -> None:
    calibrated = run_stage("calibrate", recipe(), **ENGINE).artifact
    tuned = run_stage("finetune", recipe(), **ENGINE).artifact
    exported = run_stage("export", recipe(), **ENGINE).artifact
    judged = run_stage("evaluate", recipe(), **ENGINE).artifact
    assert [p.digest for p in tuned.manifest.parents] == [calibrated.manifest.digest]
    assert [p.digest for p in judged.manifest.parents] == [a.manifest.digest for a in (exported, tuned, calibrated)]


def test_without_finetune_export_takes_the_calibration() -> None:
    short = recipe(finetune=None)
    calibrated = run_stage("calibrate", short, **ENGINE).artifact
    assert run_stage("export", short, **ENGINE).artifact.manifest.parents[0].digest == calibrated.manifest.digest


def test_a_missing_predecessor_names_the_command() -> None:
    with pytest.raises(InputError, match=r"Run: qdm calibrate my\.yaml seed=3"):
        run_stage("finetune", recipe(), recipe_args=("my.yaml", "seed=3"), **ENGINE)
    assert trace() == []
    run_stage("calibrate", recipe(), **ENGINE)
    with pytest.raises(InputError, match=r"export needs the result of finetune, .* Run: qdm finetune RECIPE"):
        run_stage("export", recipe(), **ENGINE)


def test_nothing_to_work_on() -> None:
    with pytest.raises(InputError, match="the recipe has no cache or finetune or calibrate; give --from DIR"):
        run_stage("export", recipe(calibrate=None, finetune=None), **ENGINE)


def test_another_sampler_is_refused_with_both_values() -> None:
    source = run_stage("calibrate", recipe(), **ENGINE).artifact
    with pytest.raises(InputError, match=r"sampler\.steps: .* holds for 5, the recipe says 7"):
        run_stage("finetune", recipe(sampler={"steps": 7}), source=source, **ENGINE)
    with pytest.raises(InputError, match=r"sampler\.scheduler: .* holds for the pipeline's own, the recipe says DDPMScheduler"):
        run_stage("finetune", recipe(sampler={"steps": 5, "scheduler": "DDPMScheduler"}), source=source, **ENGINE)
    sized = run_stage("calibrate", recipe(sampler={"steps": 5, "size": [8, 8]}), **ENGINE).artifact
    assert run_stage("finetune", recipe(sampler={"steps": 5, "size": [8, 8]}), source=sized, **ENGINE).status == "done"
    with pytest.raises(InputError, match=r"sampler\.size: .* holds for \[8, 8\], the recipe says \[8, 16\]"):
        run_stage("finetune", recipe(sampler={"steps": 5, "size": [8, 16]}), source=sized, **ENGINE)


def test_another_model_is_refused_with_both_names() -> None:
    source = run_stage("calibrate", recipe(), **ENGINE).artifact
    with pytest.raises(InputError, match=r"made from fake \(\w{12}\), the recipe names tiny:sd \("):
        run_stage("finetune", recipe(model={"id": "tiny:sd"}), source=source, **ENGINE)


def test_smoke_artifacts_do_not_mix_with_real_ones() -> None:
    source = run_stage("calibrate", recipe(), smoke=True, **ENGINE).artifact
    assert source.folder.parent.name == "r-smoke"
    with pytest.raises(InputError, match="made with --smoke and this run is without it"):
        run_stage("finetune", recipe(), source=source, **ENGINE)


def test_evaluate_alone_judges_the_base_model() -> None:
    alone = recipe(calibrate=None, finetune=None, export=None)
    assert run_stage("evaluate", alone, **ENGINE).artifact.manifest.parents == []
    assert run_recipe(alone, **ENGINE)[0].status == "cached"


# --- out


def test_out_is_the_artifact_itself(fakes: Path) -> None:
    outcome = run_stage("calibrate", recipe(), out=Path("here/mine"), **ENGINE)
    assert outcome.artifact.folder == (fakes / "here/mine").resolve()
    assert sorted(p.name for p in (fakes / "here").iterdir() if not p.name.startswith(".")) == ["mine"]
    assert not (fakes / "runs").exists()
    assert run_stage("calibrate", recipe(), out=Path("here/mine"), **ENGINE).status == "cached"


def test_out_may_be_an_empty_folder() -> None:
    Path("empty").mkdir()
    assert run_stage("calibrate", recipe(), out=Path("empty"), **ENGINE).status == "done"


@pytest.mark.parametrize("fresh", [False, True])
def test_out_never_overwrites_what_is_not_an_artifact(fresh: bool) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="not empty and holds no artifact"):
        run_stage("calibrate", recipe(), out=Path("mine"), fresh=fresh, **ENGINE)
    assert Path("mine/thesis.tex").read_text() == "years of work"


def test_out_with_another_artifact_needs_fresh() -> None:
    run_stage("calibrate", recipe(), out=Path("x"), **ENGINE)
    with pytest.raises(InputError, match="holds another artifact"):
        run_stage("calibrate", recipe(seed=1), out=Path("x"), **ENGINE)
    assert run_stage("calibrate", recipe(seed=1), out=Path("x"), fresh=True, **ENGINE).status == "done"
    assert open_artifact("x").manifest.seeds["recipe"] == 1


# --- whole recipes


def test_a_recipe_runs_its_stages_in_order() -> None:
    outcomes = run_recipe(recipe(), **ENGINE)
    assert [outcome.stage for outcome in outcomes] == ["calibrate", "finetune", "export", "evaluate"]
    assert outcomes[-1].artifact.result.name == "metrics.json"
    assert all(outcome.status == "cached" for outcome in run_recipe(recipe(), **ENGINE))
    assert len(trace()) == 24


def test_changing_only_evaluate_reruns_only_evaluate() -> None:
    run_recipe(recipe(), **ENGINE)
    outcomes = run_recipe(recipe(evaluate={"samples": 5}), **ENGINE)
    assert [outcome.status for outcome in outcomes] == ["cached", "cached", "cached", "done"]


def test_out_replaces_the_run_folder() -> None:
    outcomes = run_recipe(recipe(), out=Path("elsewhere"), **ENGINE)
    assert {outcome.artifact.folder.parent for outcome in outcomes} == {Path("elsewhere").resolve()}


def test_a_recipe_without_stages_is_refused() -> None:
    with pytest.raises(InputError, match="no stage"):
        run_recipe(recipe(calibrate=None, finetune=None, export=None, evaluate=None), **ENGINE)


# --- failures


@pytest.mark.parametrize(
    ("kind", "expected", "message"),
    [
        ("value", StageFailed, r"calibrate failed: ValueError: the widget is blue \(traceback in .*run\.log"),
        ("memory", OutOfMemory, r"out of memory on cpu with .* GB in use; lower calibrate\.data\.batch \(now 16\)"),
        ("python-memory", OutOfMemory, "out of memory"),
        ("disk", EnvironmentProblem, "disk full while writing .*result.json"),
        ("gate", GateFailed, "not finite at update 3"),
        ("package", EnvironmentProblem, "pip install tensorboard_that_is_not_there"),
    ],
)
def test_a_failure_publishes_nothing_and_is_continued(monkeypatch: pytest.MonkeyPatch, kind: str, expected: type, message: str) -> None:
    monkeypatch.setenv("FAKE_FAIL", f"calibrate:{kind}")
    with pytest.raises(expected, match=message):
        run_stage("calibrate", recipe(), **ENGINE)
    (partial,) = (path for path in Path("runs/r").iterdir() if not path.name.startswith("."))
    state = json.loads((partial / "state.json").read_text())
    assert partial.name.endswith(".partial") and state["status"] == "failed" and state["pid"] == os.getpid()
    assert "Traceback" in (partial / "run.log").read_text()
    assert len(trace()) == 3
    monkeypatch.delenv("FAKE_FAIL")
    outcome = run_stage("calibrate", recipe(), **ENGINE)
    assert len(trace()) == 6
    assert "continues in" in (outcome.artifact.folder / "run.log").read_text()
    assert outcome.artifact.manifest.digest == run_stage("calibrate", recipe(), out=Path("whole"), **ENGINE).artifact.manifest.digest


def test_fresh_forgets_the_units_of_a_broken_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_FAIL", "calibrate:value")
    with pytest.raises(StageFailed):
        run_stage("calibrate", recipe(), **ENGINE)
    monkeypatch.delenv("FAKE_FAIL")
    run_stage("calibrate", recipe(), fresh=True, **ENGINE)
    assert len(trace()) == 3 + 6


@pytest.mark.parametrize(("interrupt", "reason"), [(KeyboardInterrupt, "SIGINT"), (Terminated, "SIGTERM")])
def test_an_interrupt_is_recorded_and_passed_on(interrupt: type[BaseException], reason: str) -> None:
    class Interrupting(Silent):
        def progress(self, task: str, done: int, total: int, note: str = "") -> None:
            if done == 2:
                raise interrupt

    with pytest.raises(interrupt):
        run_stage("calibrate", recipe(), events=Interrupting(), **ENGINE)
    (partial,) = Path("runs/r").glob("*.partial")
    state = json.loads((partial / "state.json").read_text())
    assert (state["status"], state["reason"]) == ("interrupted", reason)
    assert run_stage("calibrate", recipe(), **ENGINE).status == "done"
    assert len(trace()) == 6


def test_a_disk_that_fills_during_publication_publishes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentProblem, match="disk full"):
        run_stage("calibrate", recipe(), **ENGINE)
    assert [path.suffix for path in Path("runs/r").iterdir() if not path.name.startswith(".")] == [".partial"]
    monkeypatch.undo()


def test_a_file_in_place_of_the_run_folder() -> None:
    Path("runs").write_text("not a folder")
    with pytest.raises(EnvironmentProblem, match=r"cannot use .*runs"):
        run_stage("calibrate", recipe(), **ENGINE)


def test_a_folder_without_write_permission() -> None:
    Path("runs").mkdir(mode=0o500)
    if os.access("runs", os.W_OK):
        pytest.skip("this user may write everywhere")
    with pytest.raises(EnvironmentProblem, match="Permission denied"):
        run_stage("calibrate", recipe(), **ENGINE)


def test_the_lock_is_per_key_and_names_its_holder() -> None:
    run = Run.start(recipe(), Options(**ENGINE))
    held = run.folder("calibrate", None)
    with held.locked(wait=False):
        held.prepare(fresh=False)
        with pytest.raises(EnvironmentProblem, match=rf"being written by process {os.getpid()} on \S+ since .*--wait"):
            run_stage("calibrate", recipe(), **ENGINE)
        assert run_stage("calibrate", recipe(seed=1), **ENGINE).status == "done"
    assert run_stage("calibrate", recipe(), **ENGINE).status == "done"


def test_a_broken_lock_holder_leaves_no_lock() -> None:
    folder = stage_folder("calibrate", "a" * 64, root=Path("runs"), out=None)
    with pytest.raises(ValueError, match="oops"), folder.locked(wait=False):
        raise ValueError("oops")
    with folder.locked(wait=False):
        pass


# --- small parts


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "disk full"),
        (OSError(errno.EFBIG, "File too large"), "disk full"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "disk full"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "cannot use x: Permission denied"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "cannot use x: Read-only"),
    ],
)
def test_storage_problems_are_told_apart(error: Exception, message: str, tmp_path: Path) -> None:
    assert message in str(storage_problem(error, tmp_path / "not" / "there"))


@pytest.mark.parametrize("error", [ValueError("No idea"), FileNotFoundError(errno.ENOENT, "gone", "x"), RuntimeError("shape")])
def test_other_errors_are_not_storage_problems(error: Exception, tmp_path: Path) -> None:
    assert storage_problem(error, tmp_path) is None


def test_safetensors_on_a_full_disk_is_a_storage_problem(tmp_path: Path) -> None:
    """In a subprocess, whose files may not grow: safetensors has an exception of its own, without errno."""
    code = f"""if True:
        import resource, numpy
        from pathlib import Path
        from safetensors.numpy import save_file
        from qdm_cli.engine.run.folder import storage_problem
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            save_file({{"w": numpy.ones(1000)}}, {str(tmp_path / "w.safetensors")!r})
        except Exception as error:
            print(storage_problem(error, Path({str(tmp_path)!r})))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert "disk full while writing" in done.stdout
    assert list(tmp_path.glob("w*")) == []


def test_out_of_memory_is_recognised() -> None:
    torch = pytest.importorskip("torch")

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("name", "line"), [("tensorboard", "pip install 'qdm[train]'"), ("lpips", "pip install 'qdm[eval]'"), ("scipy.x", "pip install scipy")]
)
def test_missing_packages_name_their_pip_line(name: str, line: str) -> None:
    assert line in str(missing_package(ModuleNotFoundError("no", name=name)))


def test_a_missing_module_of_our_own_is_a_bug() -> None:
    assert missing_package(ModuleNotFoundError("no", name="qdm_cli.engine.nothing")) is None


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "mps", ""])
def test_unknown_devices_are_refused(name: str) -> None:
    if name == "cuda:":
        name = "cuda:-1"
    with pytest.raises(InputError, match="is not one of auto, cpu, cuda, cuda:N"):
        resolve_device(name)


def test_a_gpu_that_is_not_there() -> None:
    torch = pytest.importorskip("torch")

    assert resolve_device("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(EnvironmentProblem, match="there is no such GPU"):
        resolve_device("cuda:99")


def test_smoke_shrinks_every_count_and_keeps_what_is_done() -> None:
    suites = ["fidelity", {"method": "distribution", "samples": 5000}, {"method": "cost", "repeats": 50, "batch": 8}]
    big = recipe(
        sampler={"steps": 50, "size": [512, 512]},
        model={"id": "x/y", "dtype": "float16", "loras": [{"path": "z"}]},
        calibrate={"method": "percentile", "percentile": 99.0, "data": {"samples": 128}},
        finetune={"method": "efficientdm", "rank": 8, "sampler": {"steps": 100}},
        evaluate={"suites": suites, "samples": 640, "fail_if": ["psnr<18"], "weights": {"lpips": "auto"}, "against": "x"},
    )
    small = smoke_recipe(big)
    assert (small.sampler.steps, small.sampler.size, small.model.dtype, small.model.loras) == (4, None, "float32", ())
    assert (small.calibrate.method, small.calibrate.percentile, small.calibrate.data.samples) == ("percentile", 99.0, 4)
    assert (small.finetune.iterations, small.finetune.batch_size, small.finetune.rank, small.finetune.sampler.steps) == (4, 2, 4, 4)
    assert [suite.method for suite in small.evaluate.suites] == ["fidelity", "distribution", "cost"]
    assert (small.evaluate.suites[1].samples, small.evaluate.suites[2].repeats, small.evaluate.suites[2].batch) == (4, 3, 1)
    assert (small.evaluate.samples, small.evaluate.fail_if, small.evaluate.against) == (4, (), "base")
    assert small.evaluate.weights.lpips is None


def test_smoke_keeps_values_that_are_small_already() -> None:
    tiny = recipe(sampler={"steps": 2}, finetune=None, evaluate=None)
    assert smoke_recipe(tiny).sampler.steps == 2
    assert smoke_recipe(tiny).finetune is None
