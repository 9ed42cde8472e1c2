"""The tables of kernels/README.md come from the files of results, all of them, and are in step."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from qdm_cli.engine.bench.machine import SCHEMA
from qdm_cli.engine.bench.tables import BEGIN, END, filled, plot, read_reports, tables, update

KERNELS = Path(__file__).resolve().parents[3] / "kernels"
TIMES = {"float": {"best_ms": 4.0}, "auto": {"best_ms": 2.0}}


def report(device: str, *rows: dict, cuda: str | None = None) -> dict:
    head = {"schema": SCHEMA, "device": device, "baseline": "bfloat16", "clock": "wall time", "threads": None if cuda else 2, "cuda": cuda}
    return {**head, "versions": {"torch": "2.11"}, "git_commit": "0123456789abcdef", "rows": list(rows)}


def layer(**changes: object) -> dict:
    row = {"kind": "layer", "model": "sd15", "layer": "a < b", "rows": 8, "outputs": 4, "terms": 2, "format": "w8a8", "gate": "passed"}
    ratios = {"auto": 2.0, "exact": 1.5, "integer": 3.25, "torchao int8 dynamic": 0.5}
    return {**row, "times": TIMES, "ratios": ratios, "roofline_share": {"integer": 0.42}, "chosen": "cpu onednn", **changes}


DENOISER = {"kind": "denoiser", "model": "sdxl", "batch": 2, "format": "w4a8", "times": TIMES, "ratios": {"auto": 2.0}}


def test_the_shipped_readme_is_in_step_with_the_results() -> None:
    assert update(KERNELS, check=True) == [], "run `make tables`"


def test_every_shipped_result_is_of_this_schema_and_passed_its_gate() -> None:
    for path in (KERNELS / "bench/results").rglob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        if path.name == "tuned.json":  # of the tuner, which keeps only what is right
            assert all(entry["ratio"] > 0 for entry in found["entries"]), path
            continue
        assert found["schema"] == SCHEMA, path
        assert all(row["gate"] in ("passed", "skipped") for row in found["rows"]), path


def test_rows_show_what_was_measured() -> None:
    text = tables([report("one", layer(), layer(capped_from=99), DENOISER)])
    assert "| sd15 | a < b | 8 x 4 x 2 | w8a8 | 4.00 | 2.00x | 1.50x | 3.25x | 42% | cpu onednn | torchao int8 dynamic 0.50x |" in text
    assert "8 x 4 x 2 (of 99)" in text
    assert "| sdxl | 2 | w4a8 | 4.0 | auto 2.00x |" in text
    assert "commit `012345678`" in text


def test_a_failed_row_is_named_and_a_missing_kind_of_device_gets_its_command() -> None:
    failed = layer(gate="outputs differ")
    del failed["times"]
    assert "not timed: outputs differ" in tables([report("one", failed)])
    assert "`make bench-gpu`" in tables([report("one", layer())])
    assert "`make bench`" in tables([report("two", layer(), cuda="13.0")])


def test_the_plot_is_an_image_of_every_ratio() -> None:
    picture = ElementTree.fromstring(plot([report("one", layer(), DENOISER)]))
    assert len(picture.findall("{*}rect")) == 2
    assert "sd15 a < b w8a8" in {text.text for text in picture.findall("{*}text")}


def test_update_writes_once_and_reads_only_reports(tmp_path: Path) -> None:
    (tmp_path / "bench/results/one").mkdir(parents=True)
    (tmp_path / "README.md").write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for name, content in (("a", report("one", layer())), ("b", {"schema": 1, "rows": [layer()]}), ("c", report("empty"))):
        (tmp_path / f"bench/results/one/{name}.json").write_text(json.dumps(content))
    assert len(read_reports(tmp_path / "bench/results")) == 1
    assert len(update(tmp_path, check=True)) == 2
    assert len(update(tmp_path)) == 2
    assert update(tmp_path) == []
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text


def test_a_readme_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="no pair of marks"):
        filled("nothing", [])


def test_measured_tiles_have_a_table_of_their_own(tmp_path: Path) -> None:
    tile = {"bm": 128, "bn": 64, "bk": 128, "warps": 4, "stages": 3, "tma": True}
    entry = {"op": "linear_w8a8", "m": 64, "n": 32, "k": 128, "tile": tile, "splits": 2, "us": 2.0, "bf16_us": 5.0, "ratio": 2.5}
    path = tmp_path / "sm90.json"
    path.write_text(json.dumps({"device": "some GPU", "versions": {"triton": "3.6"}, "entries": [entry]}), encoding="utf-8")
    text = filled(f"a{BEGIN}{END}b", [], (path,))
    assert "| linear_w8a8 | 64 x 32 x 128 | 5.0 | 2.0 | 2.50x | 128x64x128, 4, 3, 2, copy engine |" in text
