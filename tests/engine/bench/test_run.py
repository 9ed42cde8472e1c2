"""`qdm bench` on small layers: the gate catches wrong kernels, the report says what ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from qdm_cli.engine.bench import denoisers, layers
from qdm_cli.engine.bench.layers import Settings, gate, make_bench, measure
from qdm_cli.engine.bench.roofline import Roof
from qdm_cli.engine.bench.run import BenchPlan, run_bench
from qdm_cli.engine.bench.shapes import parse_shapes
from qdm_cli.engine.bench.timing import buffer_count, time_calls
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models.published import CONFIGS, Published
from qdm_kernels.conv2d_w8a8 import op as conv2d_op
from qdm_kernels.linear_w8a8 import op as linear_op

SETTINGS = Settings("cpu", torch.float32, rounds=2, peers=False)
ROOF = Roof(1e11, 2e11, 1e10, "float32", "test")
SMALL = ("linear:32x24x80", "conv2d:1x64x6x16")


@pytest.mark.parametrize("text", [*SMALL, "conv2d:2x64x4x16k1s2"])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_has_times_ratios_and_the_kernel(text: str, bits: int) -> None:
    row = measure(parse_shapes(text)[0], bits, SETTINGS, ROOF)
    assert row["gate"] == "passed"
    assert set(row["times"]) == {"float", "auto", "exact", "integer"}
    for name, ratio in row["ratios"].items():
        assert ratio == pytest.approx(row["times"]["float"]["best_ms"] / row["times"][name]["best_ms"])
    assert row["times"]["auto"]["p10_ms"] <= row["times"]["auto"]["median_ms"] <= row["times"]["auto"]["p90_ms"]
    assert row["roofline_share"]["float"] > 0
    assert (row["chosen"] == "float") == (row["why_not"] is not None)


@pytest.mark.parametrize("text", SMALL)
@pytest.mark.parametrize("fault", ["accumulator", "output", "float path"])
def test_the_gate_stops_a_wrong_kernel(text: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    op = linear_op if text.startswith("linear") else conv2d_op
    name = {"accumulator": "accumulate", "output": text.split(":")[0]}.get(fault)
    if name:
        real = getattr(op, name)
        wrong = lambda *args: real(*args) + (1 if args[-1].backend == "cpu" else 0)  # noqa: E731
        monkeypatch.setattr(op, name, wrong)
        bench = make_bench(parse_shapes(text)[0], 8, SETTINGS)
    else:
        bench = make_bench(parse_shapes(text)[0], 8, SETTINGS)
        bench.weight.mul_(1.2)
    assert "differ" in (gate(bench) or "") or "off its float weight" in (gate(bench) or "")


def test_a_failed_row_is_not_timed_and_fails_the_command(monkeypatch: pytest.MonkeyPatch, qdm_main) -> None:
    monkeypatch.setattr(layers, "gate", lambda bench: "planted")
    code, out = qdm_main(["bench", SMALL[0], "--bits", "4", "--format", "json"])
    (row,) = json.loads(out)["result"]["rows"]
    assert (code, row["gate"], "times" in row) == (5, "planted", False)


@pytest.fixture
def qdm_main(capsys: pytest.CaptureFixture[str]):
    from qdm_cli import main

    def call(argv: list[str]) -> tuple[int, str]:
        code = main.run(argv)
        return code, capsys.readouterr().out

    return call


def test_the_report_is_written_row_by_row(tmp_path: Path) -> None:
    seen: list[int] = []
    out = tmp_path / "results"

    def say(line: str) -> None:
        seen.append(sum(len(json.loads(path.read_text())["rows"]) for path in out.rglob("*.json")))

    report = run_bench(BenchPlan(SMALL, bits=(4,), rounds=1, peers=False), out, say)
    assert seen == [0, 1]
    stored = json.loads(Path(report["path"]).read_text())
    assert [row["gate"] for row in stored["rows"]] == ["passed", "passed"]
    assert stored["versions"]["torch"] == torch.__version__
    assert not list(out.rglob("*.partial"))


def test_refusals() -> None:
    with pytest.raises(InputError, match="--bits 9"):
        run_bench(BenchPlan(SMALL, bits=(9,)), None, print)
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match="no CUDA device"):
            run_bench(BenchPlan(SMALL, device="cuda"), None, print)


@pytest.fixture
def small_published(monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "sample_size": 8,
        "cross_attention_dim": 16,
        "attention_head_dim": 2,
        "block_out_channels": [32, 32],
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    }
    monkeypatch.setitem(CONFIGS, "sd15", Published("UNet2DConditionModel", config, 300_000, 8))


def test_a_whole_denoiser(small_published, monkeypatch: pytest.MonkeyPatch) -> None:
    row = denoisers.measure_denoiser("sd15", 8, SETTINGS)
    assert row["gate"] == "passed"
    assert 0 < row["relative_error"] < 0.2
    assert row["layers"]["integer"] + row["layers"]["float"] > 20
    assert sum(row["layers"]["why_not"].values()) == row["layers"]["float"]
    monkeypatch.setattr(denoisers, "MEMORY_FACTOR", 1e9)
    skipped = denoisers.measure_denoiser("sd15", 8, SETTINGS)
    assert skipped["gate"] == "skipped"
    assert "GB are free" in skipped["why"]


def test_calls_are_interleaved_over_the_buffers() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: (lambda index, name=name: seen.append((name, index))) for name in "ab"}
    times = time_calls(calls, buffers=3, device="cpu", rounds=4, warm_up=1)
    assert seen == [(name, turn % 3) for turn in range(5) for name in "ab"]
    assert set(times) == {"a", "b"}
    assert buffer_count(1, "cpu") == 16
    assert buffer_count(1 << 30, "cpu") == 2
