"""`qdm bench --tune`: layers become problems of the tuner, results go to the user's file, no GPU is a clear error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qdm_cli.engine.bench.shapes import parse_shapes
from qdm_cli.engine.bench.tune import problems_of, tune_layers
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_kernels.gemm import tiles, tune


def test_layers_become_problems() -> None:
    found = problems_of(parse_shapes("sd15"), (8, 4))
    assert len(found) == len(set(found))
    assert {problem.bits for problem in found} == {8, 4}
    assert {problem.op for problem in found if problem.rows <= 16} == {"linear_w8a16", "linear_w4a16"}
    assert not any(problem.floats for problem in found if problem.rows > 16)
    conv = next(problem for problem in found if problem.side == 3)
    assert (conv.op, conv.rows, conv.terms, conv.image) == ("conv2d_w8a8", 8192, 2880, (64, 64))
    (one,) = problems_of(parse_shapes("linear:100x64x77"), (4,))
    assert (one.op, one.terms) == ("linear_w4a8", 128)
    assert problems_of(parse_shapes("conv2d:2x64x8x64k3s2"), (8,)) == []
    with pytest.raises(InputError, match="8 or 4 bits"):
        problems_of(parse_shapes("dit256"), (8, 3))


def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(EnvironmentProblem, match="CUDA GPU"):
        tune_layers(["dit256"], (8,), device="cpu", seconds=1, say=print)


def test_results_go_to_the_users_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tuner itself runs in tests of the GPU; here it reports two layers, of which one had no right candidate, and time for no more."""
    path, said = tmp_path / "mine.json", []
    plan = tiles.Plan(tiles.TILES[0])

    def tuned(problems: list[tune.Problem], device: torch.device, seconds: float, workers: int) -> Any:
        first = problems[0]
        entry = tiles.entry(first.op, first.rows, first.outputs, first.terms, plan, us=2.0, bf16_us=3.0, ratio=1.5)
        yield {"entry": entry, "rows": first.rows, "tried": {}, "faults": {}}
        yield {"entry": None, "problem": str(problems[1]), "faults": {"a tile": "wrong"}}

    monkeypatch.setenv("QDM_TUNED", str(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(tune, "tuned", tuned)
    report = tune_layers(["dit256"], (8,), device="cuda", seconds=1, say=said.append)
    assert report["file"] == str(path)
    assert report["not_reached"] == 2
    assert "1.50x of bf16" in said[0]
    assert "no candidate is right" in said[1]
    (entry,) = json.loads(path.read_text())["entries"]
    assert tiles.measured("linear_w8a8", entry["m"], entry["n"], entry["k"], 90, path) == plan
