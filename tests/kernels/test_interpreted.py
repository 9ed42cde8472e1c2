"""Runs every file of an `interpreted/` folder under triton's interpreter, one process each: the switch is read when a kernel is defined."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")


def version(package: object) -> tuple[int, ...]:
    return tuple(int(part) for part in package.__version__.split(".")[:2])


if version(triton) < (3, 9) and version(numpy) >= (2, 4):
    pytest.skip("the interpreter of this triton takes no loop bound from numpy 2.4 or later", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "tests").glob("**/interpreted/test_*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_under_the_interpreter(path: Path) -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(path)]
    if os.environ.get("KERNEL_MATRIX") != "full":
        command += ["-m", "not slow"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=280)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_there_are_some() -> None:
    assert FILES
