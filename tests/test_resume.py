"""kill -9 in the middle of the real stages, then the same command again: bit-identical files (interface specification 14.5)."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qdm_cli.engine.artifact import hash_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROOT = Path(__file__).resolve().parents[1]
RECIPE = """
name: r
model: {id: "tiny:ddpm"}
sampler: {scheduler: DDIMScheduler, steps: 3}
device: {name: cpu}
quantize: {activations: {bits: 4, timestep_aware: true}}
calibrate: {method: mse, samples_per_step: 4, data: {samples: 6, batch: 1}}
finetune: {method: efficientdm, iterations: 12, batch_size: 2, rank: 4, checkpoint_every: 2}
"""


def qdm(*words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "qdm_cli", *words, "--offline"]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=variables)


def finish(*words: str) -> Path:
    process = qdm(*words)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    return Path(out.strip())


def units(stage: str) -> tuple[tuple[str, int, int], ...]:
    """Name, size and time of everything in the stage's `resume` folder."""
    found = []
    for path in Path("runs/r").glob(f"{stage}-*.partial/resume/**/*"):
        try:
            facts = path.stat()
        except FileNotFoundError:  # a temporary name that was just renamed
            continue
        found.append((str(path), facts.st_size, facts.st_mtime_ns))
    return tuple(sorted(found))


def kill_after(changes: int, stage: str, *words: str) -> None:
    """Start the command and kill it the moment its resume folder has changed that often."""
    process, seen, last = qdm(*words), 0, units(stage)
    while process.poll() is None and seen < changes:
        time.sleep(0.002)
        now = units(stage)
        seen, last = seen + (now != last), now
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"{stage} was over after {seen} changes"


def result_files(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "qdm.json").read_text())
    assert manifest["files"]
    story = ("recipe", "run.log", "metrics.jsonl", "qdm.json")
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(story)]
    return {path.relative_to(folder).as_posix(): hash_file(path) for path in paths}


@pytest.fixture
def recipe(tmp_cwd: Path) -> str:
    (tmp_cwd / "r.yaml").write_text(RECIPE)
    return "r.yaml"


@pytest.mark.parametrize(("stage", "points"), [("calibrate", (2, 5)), ("finetune", (3, 4))])
def test_kill_9_anywhere_gives_the_same_bits(recipe: str, stage: str, points: tuple[int, ...]) -> None:
    words = [stage, recipe]
    if stage == "finetune":
        words += ["--from", str(finish("calibrate", recipe))]
    whole = finish(*words, "--out", "whole")
    for changes in points:
        kill_after(changes, stage, *words)
    resumed = finish(*words)
    assert "continues in" in (resumed / "run.log").read_text()
    assert result_files(resumed) == result_files(whole)
    assert json.loads((resumed / "qdm.json").read_text())["digest"] == json.loads((whole / "qdm.json").read_text())["digest"]
