"""kill -9 in calibrate and in finetune: the next run ends with the same bytes as one that was never killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

RECIPE = """
version: 1
model: {id: "tiny:ddpm"}
sampler: {scheduler: DDIMScheduler, steps: 4}
quantize: {weights: {bits: 4}, activations: {bits: 4, timestep_aware: true}}
calibrate: {method: minmax, data: {samples: 4, batch: 1}, samples_per_step: 2}
finetune: {method: efficientdm, iterations: 24, batch_size: 2, checkpoint_every: 4, order: shuffled, ema: 0.9}
"""


def qdm(*arguments: str, cwd: Path) -> subprocess.Popen:
    root = Path(__file__).parents[3]
    env = os.environ | {"PYTHONPATH": f"{root}{os.pathsep}{root / 'kernels'}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, "-m", "qdm_cli", *arguments], cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen) -> Path:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err.decode()
    return Path(out.decode().strip())


def kill_when(process: subprocess.Popen, seen, timeout: float = 300) -> None:
    """SIGKILL as soon as `seen()` holds; fails when the process ends first."""
    deadline = time.monotonic() + timeout
    while not seen():
        assert process.poll() is None, process.communicate()[1].decode()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def digest(folder: Path) -> str:
    return json.loads((folder / "qdm.json").read_text())["digest"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "r.yaml").write_text(RECIPE)
    calibrated = finish(qdm("calibrate", "r.yaml", cwd=folder))
    return {"recipe": folder / "r.yaml", "calibrate": calibrated, "finetune": finish(qdm("finetune", "r.yaml", cwd=folder))}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("unit", ["trajectories/batch-00001.json", "ranges-0001.safetensors"], ids=["trajectories", "ranges"])
def test_killed_calibrate_ends_with_the_same_bytes(whole, tmp_path, unit):
    (tmp_path / "r.yaml").write_text(RECIPE)
    kill_when(qdm("calibrate", "r.yaml", cwd=tmp_path), lambda: list(tmp_path.glob(f"runs/r/calibrate-*.partial/resume/{unit}")))
    assert not list(tmp_path.glob("runs/r/calibrate-*/qdm.json")), "killed too late to prove anything"
    assert digest(finish(qdm("calibrate", "r.yaml", cwd=tmp_path))) == digest(whole["calibrate"])


@pytest.mark.timeout(900)
def test_killed_finetune_continues_from_its_checkpoint_to_the_same_bytes(whole, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    arguments = ("finetune", "r.yaml", "--from", str(whole["calibrate"]))
    kill_when(qdm(*arguments, cwd=tmp_path), lambda: list(tmp_path.glob("runs/r/finetune-*.partial/resume/train.safetensors")))
    assert not list(tmp_path.glob("runs/r/finetune-*/qdm.json")), "killed too late to prove anything"
    resumed = qdm(*arguments, cwd=tmp_path)
    out, err = resumed.communicate(timeout=300)
    assert resumed.returncode == 0 and b"Resuming at update" in err
    assert digest(Path(out.decode().strip())) == digest(whole["finetune"])
