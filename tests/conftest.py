"""Shared by all tests: offline, quiet, one thread per xdist worker, uninitialised memory poisoned."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parents[1]

# Before anything imports torch or huggingface_hub: both read their environment once. Subprocesses of tests inherit it.
for _name in [name for name in os.environ if name.startswith("QDM_") and name != "QDM_FASHION_MNIST"]:
    del os.environ[_name]
os.environ |= {
    "QDM_OFFLINE": "1",
    "QDM_MODE": "exact",  # the same bits on every machine
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MPLBACKEND": "Agg",
}
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

# No deadline: two shared cores make a 200 ms limit a coin toss. The same examples in every CI run.
hypothesis.settings.register_profile("qdm", deadline=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("qdm")


LONGEST = (
    "test_resume.py",
    "test_pipes.py",
    "test_interpreted.py",
    "test_main.py",
    "test_packaging.py",
)  # files that take minutes: begun last, they would leave all but one worker idle


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Longest files first. Skips `gpu` tests where there is no CUDA device; torch is imported only when there is such a test."""
    items.sort(key=lambda item: item.path.name not in LONGEST)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def poison_(tensor: Any) -> Any:
    """Fills a tensor with NaN, with the largest integer, or with True: what nobody wrote must not look like data."""
    import torch

    if tensor.dtype == torch.bool:
        value: float | int | bool = True
    elif tensor.dtype.is_floating_point or tensor.dtype.is_complex:
        value = float("nan")
    else:
        value = torch.iinfo(tensor.dtype).max
    with torch.no_grad():
        return tensor.fill_(value)


def _poisoned(allocate: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(allocate)
    def empty(*args: Any, **kwargs: Any) -> Any:
        return poison_(allocate(*args, **kwargs))

    empty.poisoned = True  # type: ignore[attr-defined]
    return empty


def pytest_runtest_setup(item: pytest.Item) -> None:
    """From the first test that finds torch imported on, `torch.empty*` and `Tensor.new_empty*` are poisoned."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "Tensor") or hasattr(torch.empty, "poisoned"):
        return
    for owner, names in ((torch, ("empty", "empty_like", "empty_strided")), (torch.Tensor, ("new_empty", "new_empty_strided"))):
        for name in names:
            setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return ROOT


@pytest.fixture
def tmp_cwd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that is the working directory, so that `runs/` lands in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
