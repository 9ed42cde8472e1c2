"""`qdm plan` and `--dry-run`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdm_cli.commands.plan import duration, size
from qdm_cli.main import run

TEXT = """
model: {id: tiny:ddpm}
sampler: {steps: 3}
quantize: {rules: [{match: conv_out, skip: true, why: last layer}]}
calibrate: {method: minmax, data: {samples: 2, batch: 2}}
export: {}
"""


@pytest.fixture
def recipe(tmp_cwd: Path) -> str:
    (tmp_cwd / "r.yaml").write_text(TEXT)
    return "r.yaml"


def printed(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = run(argv)
    out, err = capsys.readouterr()
    return code, out, err


def test_for_people(recipe: str, capsys: pytest.CaptureFixture[str], tmp_cwd: Path) -> None:
    code, out, _ = printed(capsys, "plan", recipe)
    assert code == 0
    rows = [line.split() for line in out.splitlines()]
    assert next(row for row in rows if row[:1] == ["conv_in"])[1:4] == ["Conv2d", "32x3x3x3", "W8A8"]
    assert next(row for row in rows if row[:1] == ["conv_out"])[3] == "float"
    assert "last layer" in out
    assert "unknown (--measure)" in out
    assert "target qdm (auto" in out
    assert [path.name for path in tmp_cwd.iterdir()] == ["r.yaml"]


def test_for_programs_and_as_a_dry_run(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = printed(capsys, "plan", recipe, "quantize.weights.bits=8", "--format", "json")
    found = json.loads(out)
    assert (code, found["status"], found["exit_code"]) == (0, "done", 0)
    assert found["total_bytes"] == sum(found["bytes"].values())
    assert {row["bits_w"] for row in found["layers"] if not row["skipped_why"]} == {8}
    dry = json.loads(printed(capsys, "calibrate", recipe, "quantize.weights.bits=8", "--dry-run", "--format", "json")[1])
    assert dry["layers"] == found["layers"]


def test_what_would_fail_is_printed_with_the_plan_and_its_exit_code(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, "plan", recipe, "device.max_cpu=1MB")
    assert code == 4
    assert "conv_in" in out
    assert "would fail (exit 4): calibrate needs about" in err
    assert "device.max_cpu" in err
    code, out, _ = printed(capsys, "plan", recipe, "device.max_cpu=1MB", "--format", "json")
    assert (code, json.loads(out)["status"], json.loads(out)["failures"][0]["exit_code"]) == (4, "failed", 4)


def test_a_rule_that_matches_nothing_has_its_position(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = printed(capsys, "plan", recipe, "quantize.rules+={match: conv_inn, bits: 8}")
    assert (code, out) == (2, "")
    assert "override 1  quantize.rules.1.match: 'conv_inn' matches no layer. The nearest module names are conv_in" in err


def test_fetch_downloads_and_offline_forbids_it(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "plan", recipe, "model.id=nowhere/nothing", "--fetch", "--offline")[0] == 3


@pytest.mark.parametrize(("count", "text"), [(999, "999 B"), (1500, "1.50 kB"), (2_000_000, "2.00 MB"), (3e12, "3000.00 GB")])
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (90, "2 min"), (7200, "2.0 h")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
