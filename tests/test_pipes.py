"""The command as the shell sees it: pipes, closed streams, locales, signals, locks, kill -9. Real processes, fake stages."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAKES = ROOT / "tests" / "fakes"
QDM = f"{shlex.quote(sys.executable)} {shlex.quote(str(FAKES / 'fake_qdm.py'))}"
RECIPE = """
model: {id: "tiny:ddpm"}
sampler: {steps: 5}
device: {name: cpu}
calibrate: {method: mse}
finetune: {method: efficientdm, iterations: 10}
export: {}
evaluate: {samples: 2}
"""


@pytest.fixture
def folder(tmp_cwd: Path) -> Path:
    (tmp_cwd / "r.yaml").write_text(RECIPE)
    return tmp_cwd


def environment(**changes: str) -> dict[str, str]:
    """The test's environment without what steers colors; `no_torch` stands in for torch."""
    steering = ("NO_COLOR", "FORCE_COLOR", "CI", "TERM", "COLUMNS", "GITHUB_ACTIONS")
    base = {name: value for name, value in os.environ.items() if name not in steering}
    path = os.pathsep.join([str(FAKES / "no_torch"), str(ROOT), str(ROOT / "kernels")])
    return {**base, "PYTHONPATH": path, "FAKE_TRACE": "trace", "TERM": "xterm", **changes}


def sh(line: str, *, stdin: Any = subprocess.DEVNULL, **changes: str) -> subprocess.CompletedProcess[str]:
    """One line of bash in which `qdm` is the fake command."""
    script = f'set -o pipefail; qdm() {{ {QDM} "$@"; }}; {line}'
    return subprocess.run(["bash", "-c", script], capture_output=True, text=True, stdin=stdin, env=environment(**changes), timeout=240)


def start(*words: str, **changes: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(FAKES / "fake_qdm.py"), *words]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, env=environment(**changes), preexec_fn=_heed_interrupts)


def _heed_interrupts() -> None:
    """A suite that runs in the background of a shell hands down an ignored SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for_units(count: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if len(trace()) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"no {count} units within {seconds} s: {trace()}")


def trace() -> list[str]:
    path = Path("trace")
    return path.read_text().splitlines() if path.exists() else []


def digest_of(folder: str) -> str:
    return str(json.loads(Path(folder.strip(), "qdm.json").read_text())["digest"])


# --- pipes


def test_the_four_stages_in_a_pipe(folder: Path) -> None:
    tee = "qdm calibrate r.yaml | tee 1 | qdm finetune r.yaml --from - | tee 2 | qdm export r.yaml --from - | tee 3"
    done = sh(f"{tee} | qdm evaluate r.yaml --from -")
    assert done.returncode == 0, done.stderr
    steps = [Path(name).read_text() for name in ("1", "2", "3")] + [done.stdout]
    assert all(re.fullmatch(r"/\S+\n", step) for step in steps)
    assert Path(steps[3].strip()).name == "metrics.json"
    parents = json.loads(Path(steps[3].strip()).with_name("qdm.json").read_text())["parents"]
    assert [parent["path"] for parent in parents] == [step.strip() for step in reversed(steps[:3])]


def test_json_through_a_pipe(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml --format json | qdm finetune r.yaml --from - --format json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "done"


@pytest.mark.parametrize("form", ["human", "json"])
def test_a_failed_step_ends_the_pipe(folder: Path, form: str) -> None:
    done = sh(f"qdm calibrate r.yaml --format {form} | qdm finetune r.yaml --from - --format {form}", FAKE_FAIL="calibrate:value")
    assert done.returncode == 2
    assert "the previous step produced nothing" in done.stderr
    assert "the widget is blue" in done.stderr
    assert (done.stdout == "") if form == "human" else (json.loads(done.stdout)["exit_code"] == 2)


def test_a_recipe_on_stdin(folder: Path) -> None:
    done = sh("cat r.yaml | qdm calibrate - name=piped")
    assert done.returncode == 0 and Path(done.stdout.strip()).parent == folder / "runs" / "piped"
    assert Path(done.stdout.strip(), "recipe.yaml").read_text() == RECIPE


def test_a_path_with_spaces_and_other_letters(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml --out 'mein Ordner/größe' | qdm finetune r.yaml --from - --out 'b c'", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder}/b c\n"


# --- stdin


@pytest.mark.parametrize("redirection", ["</dev/null", "<&-"], ids=["empty", "closed"])
def test_empty_and_closed_stdin(folder: Path, redirection: str) -> None:
    done = sh(f"qdm finetune r.yaml --from - {redirection}")
    assert (done.returncode, done.stdout) == (2, "")
    assert "the previous step produced nothing" in done.stderr


def test_a_terminal_is_never_waited_for(folder: Path) -> None:
    controller, terminal = pty.openpty()
    try:
        done = sh("qdm finetune r.yaml --from -", stdin=terminal)
    finally:
        os.close(controller)
        os.close(terminal)
    assert done.returncode == 2 and "stdin is a terminal" in done.stderr


# --- stdout and stderr


def test_closed_stdout_puts_the_path_on_stderr(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml >&-")
    assert (done.returncode, done.stdout) == (0, "")
    (artifact,) = Path("runs/r").glob("calibrate-????????")
    assert done.stderr.splitlines()[-1] == str(artifact.resolve())


def test_a_closed_pipe_exits_141(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml | true; echo ${PIPESTATUS[0]}")
    assert done.stdout == "141\n"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert sh("qdm --help | true; echo ${PIPESTATUS[0]}").stdout == "141\n"


def test_stderr_that_nobody_reads_does_not_end_the_work(folder: Path) -> None:
    done = sh("{ qdm calibrate r.yaml 2>&1 >&3 | true; } 3>&1; sleep 0.2", FAKE_DELAY="0.02")
    assert Path(done.stdout.strip(), "qdm.json").exists()


def test_closed_stderr(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml 2>&-")
    assert done.returncode == 0 and Path(done.stdout.strip(), "qdm.json").exists()


def test_no_colors_and_no_animation_off_the_terminal(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml")
    assert "\x1b" not in done.stderr + done.stdout
    lines = done.stderr.splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines)
    assert [line.split(" ", 1)[1] for line in lines if "/6" in line] == ["calibrate 1/6  fake", "calibrate 6/6  fake"]


def on_terminal(line: str, **changes: str) -> str:
    """What a person sees on a terminal that is stderr (and stdout)."""
    controller, terminal = pty.openpty()
    script = f'qdm() {{ {QDM} "$@"; }}; {line}'
    process = subprocess.Popen(["bash", "-c", script], stdin=terminal, stdout=terminal, stderr=terminal, env=environment(**changes))
    os.close(terminal)
    seen = b""
    while True:
        try:
            block = os.read(controller, 65536)
        except OSError:  # the last writer has gone
            break
        if not block:
            break
        seen += block
    os.close(controller)
    assert process.wait() == 0, seen
    return seen.decode()


def test_colors_and_animation_on_a_terminal(folder: Path) -> None:
    seen = on_terminal("qdm calibrate r.yaml")
    assert "\x1b[" in seen and "━" in seen
    for quieter in ({"TERM": "dumb"}, {"CI": "true"}, {"QDM_NO_PROGRESS": "1"}):
        assert "━" not in on_terminal("qdm calibrate r.yaml --fresh", **quieter)


def test_no_color_on_a_terminal(folder: Path) -> None:
    seen = on_terminal("qdm calibrate r.yaml", NO_COLOR="1")
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", seen)


def test_force_color_without_a_terminal(folder: Path) -> None:
    done = sh("qdm calibrate missing.yaml", FORCE_COLOR="1")
    assert done.returncode == 2 and "\x1b[31m" in done.stderr


@pytest.mark.parametrize(
    "changes",
    [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
    ids=["C", "C without UTF-8 mode", "ascii streams"],
)
def test_other_locales(folder: Path, changes: dict[str, str]) -> None:
    Path("größe.yaml").write_text(RECIPE.replace("steps: 5", "stëps: 5"), encoding="utf-8")
    done = sh("qdm calibrate größe.yaml; qdm ls | head -c 9", **changes)
    assert "UnicodeEncodeError" not in done.stderr and "Traceback" not in done.stderr
    assert ":3:11" in done.stderr


def test_warnings_of_libraries_go_to_the_log(folder: Path) -> None:
    done = sh("qdm calibrate r.yaml", FAKE_FAIL="calibrate:noise")
    assert done.stdout.count("\n") == 1
    assert "worried" not in done.stderr
    assert "some library is worried" in Path(done.stdout.strip(), "run.log").read_text()
    assert "worried" in sh("qdm calibrate r.yaml --fresh -v", FAKE_FAIL="calibrate:noise").stderr


# --- signals, kill, locks, storage


@pytest.mark.parametrize(("number", "code", "name"), [(signal.SIGINT, 130, "SIGINT"), (signal.SIGTERM, 143, "SIGTERM")])
def test_signals_leave_the_folder_in_order_and_say_how_to_go_on(folder: Path, number: signal.Signals, code: int, name: str) -> None:
    process = start("calibrate", "r.yaml", "name=a-b", FAKE_DELAY="1.0")  # the signal must come before the end, on a busy machine too
    wait_for_units(2)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (code, "")
    assert f"interrupted by {name}; this continues it:  qdm calibrate r.yaml name=a-b" in err
    assert "Traceback" not in err
    (partial,) = Path("runs/a-b").glob("*.partial")
    assert json.loads((partial / "state.json").read_text())["status"] == "interrupted"
    before = len(trace())
    done = sh("qdm calibrate r.yaml name=a-b")
    assert done.returncode == 0 and len(trace()) - before == 6 - before


def test_an_interrupt_is_one_object_in_json_mode(folder: Path) -> None:
    process = start("calibrate", "r.yaml", "--format", "json", FAKE_DELAY="0.3")
    wait_for_units(1)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert json.loads(out)["exit_code"] == 143


def test_kill_9_anywhere_changes_no_result(folder: Path) -> None:
    whole = sh("qdm calibrate r.yaml --out whole").stdout
    Path("trace").unlink()
    for units in (1, 3, 5):
        process = start("calibrate", "r.yaml", FAKE_DELAY="0.2")
        wait_for_units(units)
        process.kill()
        process.communicate()
        assert not list(Path("runs/r").glob("calibrate-????????"))
    resumed = sh("qdm calibrate r.yaml")
    assert resumed.returncode == 0 and "continues in" in resumed.stderr
    assert digest_of(resumed.stdout) == digest_of(whole)
    assert Path(resumed.stdout.strip(), "result.json").read_bytes() == Path(whole.strip(), "result.json").read_bytes()


def test_of_two_processes_one_works(folder: Path) -> None:
    first = start("calibrate", "r.yaml", FAKE_DELAY="1")
    wait_for_units(1)
    second = sh("qdm calibrate r.yaml")
    assert second.returncode == 3
    assert f"process {first.pid} on {os.uname().nodename}" in second.stderr and "--wait" in second.stderr
    waiting = start("calibrate", "r.yaml", "--wait", "--format", "json")
    out, _ = first.communicate(timeout=120)
    assert first.returncode == 0
    waited, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0 and json.loads(waited)["artifact"] == out.strip()
    assert json.loads(waited)["status"] == "cached"
    assert len(trace()) == 6


def test_a_full_disk_exits_3_and_publishes_nothing(folder: Path) -> None:
    done = sh("ulimit -f 1; qdm calibrate r.yaml; echo $?", FAKE_FAIL="calibrate:big")
    assert done.stdout == "3\n"
    assert "disk full while writing" in done.stderr
    assert not list(Path("runs/r").glob("calibrate-????????"))
    assert sh("qdm calibrate r.yaml").returncode == 0


def test_a_read_only_place_exits_3(folder: Path) -> None:
    Path("runs").write_text("in the way")
    done = sh("qdm calibrate r.yaml; qdm calibrate r.yaml --out /proc/qdm/x; echo $?")
    assert done.stdout == "3\n"
    assert done.stderr.count("error: cannot use") == 2 and "Traceback" not in done.stderr


def test_the_module_is_the_command(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-m", "qdm_cli", "--version"], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.startswith("qdm ")
