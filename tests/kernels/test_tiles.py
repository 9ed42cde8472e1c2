"""Tiles: shipped measurements are usable, the user's file wins, a new resolution looks nothing up twice; what the tuner offers fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="pip install 'qdm[dev]' brings triton on Linux")

from qdm_kernels.conv2d_w8a8.tiles import choose_conv_plan
from qdm_kernels.gemm import tiles, tune
from qdm_kernels.gemm.tiles import SHARED_BYTES, TMA_TILES, Plan, Tile, bucket, choose_plan, entry, measured, weight_only_tile

CPU = torch.device("cpu")  # counts as an H100
SHIPPED = sorted((Path(tiles.__file__).parents[1] / "tuned").glob("sm*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_measurements_fit_their_gpu(path: Path) -> None:
    capability, content = int(path.stem[2:]), json.loads(path.read_text())
    assert content["schema"] == tune.SCHEMA
    assert content["device"]
    for e in content["entries"]:
        tile = Tile(**e["tile"])
        assert e["op"] in ("linear_w8a8", "linear_w4a8", "conv2d_w8a8", "conv2d_w4a8", "linear_w4a16", "linear_w8a16")
        assert e["m"] == bucket(e["m"])
        assert e["k"] % tile.bk == 0
        assert tile.since <= capability
        assert tile.shared_bytes <= SHARED_BYTES[capability]
        assert e["us"] > 0


@pytest.mark.parametrize("op", ["linear_w8a8", "conv2d_w8a8"])
def test_the_users_file_wins_and_serves_a_whole_bucket(op: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(Tile(64, 64, 64, 4, 4), 3)
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"schema": 1, "device": "here", "entries": [entry(op, 2000, 1280, 5760, plan, us=1.0)]}))
    monkeypatch.setenv("QDM_TUNED", str(file))
    tiles.user_file.cache_clear()
    try:
        for rows in (1025, 1500, 2048):
            found = choose_plan(op, rows, 1280, 5760, CPU) if op == "linear_w8a8" else choose_conv_plan(op, rows, 1280, 9, 640, CPU)
            assert found == plan
        assert choose_plan(op, 2049, 1280, 5760, CPU) != plan
    finally:
        tiles.user_file.cache_clear()


def test_an_entry_that_does_not_run_here_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({"entries": [entry("linear_w8a8", 512, 7, 64, Plan(TMA_TILES[1]))]}))
    assert measured("linear_w8a8", 512, 7, 64, 90, file) == Plan(TMA_TILES[1])
    assert measured("linear_w8a8", 512, 7, 64, 89, file) is None


def test_strides_get_no_copy_engine() -> None:
    assert choose_conv_plan("conv2d_w8a8", 8192, 640, 9, 640, CPU).tile.tma
    assert not choose_conv_plan("conv2d_w8a8", 8192, 640, 9, 640, CPU, dense=False).tile.tma


@pytest.mark.parametrize(("m", "n", "k"), [(4608, 12288, 3072), (2048, 1280, 1280), (128, 960, 960), (64, 320, 320), (1, 6912, 1152)])
def test_modelled_plans(m: int, n: int, k: int) -> None:
    """Large grids take the largest tile unsplit; few rows change places with the weights."""
    plan = choose_plan("not measured", m, n, k, CPU)
    assert k % plan.tile.bk == 0
    assert plan.tile.swap == (m <= 32)
    if m >= 2048:
        assert (plan.tile.bm, plan.tile.bn, plan.splits) == (128, 128, 1)


def test_the_tuner_offers_what_fits() -> None:
    for problem in tune.SHAPES:
        plans = tune.candidates(problem, CPU)
        assert plans
        assert len(set(plans)) == len(plans) <= 64
        for plan in plans:
            assert problem.few_rows or problem.terms % plan.tile.bk == 0
            assert plan.tile.shared_bytes <= SHARED_BYTES[90]
    assert tune.conv((2, 320, 64, 640))[0].image == (64, 64)
    assert not any(plan.tile.tma for plan in tune.candidates(tune.SHAPES[0], CPU) if plan.tile.swap)


def test_weight_only_tiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least that holds the rows, within a group; a measured one where there is."""
    assert [weight_only_tile(m, 64, 1152, 0, CPU).bm for m in (1, 16, 17, 64, 900)] == [16, 16, 32, 64, 128]
    assert weight_only_tile(1, 64, 1152, 64, CPU).bk == 64
    plan, file = Plan(Tile(16, 128, 128, 8, 5)), tmp_path / "mine.json"
    file.write_text(json.dumps({"entries": [entry("linear_w8a16", 2, 64, 1152, plan)]}))
    monkeypatch.setenv("QDM_TUNED", str(file))
    tiles.user_file.cache_clear()
    try:
        assert weight_only_tile(8, 64, 1152, 0, CPU, 8) == plan.tile
        assert weight_only_tile(8, 64, 1152, 64, CPU, 8) != plan.tile
        assert weight_only_tile(8, 64, 1152, 0, CPU, 4) != plan.tile
    finally:
        tiles.user_file.cache_clear()


def test_files_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    file, first, second = tmp_path / "a/tuned.json", Plan(Tile(64, 64, 64, 4, 4)), Plan(Tile(64, 128, 64, 4, 4), 2)
    for entries in (
        [entry("linear_w8a8", 100, 8, 64, first), entry("linear_w8a8", 100, 9, 64, first)],
        [entry("linear_w8a8", 99, 8, 64, second)],
    ):
        tune.write(file, entries, CPU)
    found = {(e["m"], e["n"]): e["splits"] for e in json.loads(file.read_text())["entries"]}
    assert found == {(128, 8): 2, (128, 9): 1}
