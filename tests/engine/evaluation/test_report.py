"""Reports from the content of metrics.json."""

from __future__ import annotations

import io
from html.parser import HTMLParser
from typing import Any

import pytest
import torch
from PIL import Image

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.evaluation import charts
from qdm_cli.engine.evaluation.report import number, render_html, render_markdown
from qdm_cli.engine.evaluation.result import Evaluation, compare, read_evaluation


def evaluation(**fields: Any) -> Evaluation:
    values: dict[str, Any] = {
        "subject": {"name": "w4a4", "kind": "exported", "digest": "d"},
        "reference": {"name": "base", "kind": "base", "digest": "b"},
        "simulated": False,
        "metrics": {"psnr": 28.31742, "fid[fashion]": 12.5, "fid[fashion]_floor": 0.11, "fid": None, "fid_why": "no weights"},
        "protocol": {"common": {"sampler": {"scheduler": None, "steps": 20}, "size": [1, 32, 32], "seed": 0}, "distribution": {"n": 500}},
    }
    return Evaluation(**{**values, **fields})


class Checker(HTMLParser):
    """Every opened tag is closed, and nothing points outside."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.outside += [str(value) for name, value in attrs if name in ("src", "href") and not str(value).startswith("data:")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_stands_alone() -> None:
    checker = Checker()
    checker.feed(render_html(evaluation(), {"grid": b"png", "timesteps": b"png"}))
    assert checker.open == [] and checker.outside == []


def test_distances_are_shown_with_their_floor() -> None:
    page = render_html(evaluation(), {})
    assert "floor: real against real" in page and "0.11" in page and "500 images" in page
    floorless = evaluation(metrics={"psnr": 3.0})
    assert "floor" not in render_html(floorless, {}).replace(".bar.floor", "")


def test_null_metrics_are_listed_with_the_reason() -> None:
    for text in (render_html(evaluation(), {}), render_markdown(evaluation(), {})):
        assert "no weights" in text
        assert "28.32 dB" in text


def test_names_from_models_are_escaped() -> None:
    layer = {
        "name": "<script>alert(1)</script>",
        "bits_w": 4,
        "bits_a": 8,
        "weight_sqnr_db": 20.0,
        "output_error": 0.1,
        "skipped_why": None,
    }
    page = render_html(evaluation(layers=[layer], subject={"name": "<b>x", "kind": "exported", "digest": "d"}), {})
    assert "<script>" not in page and "<b>x" not in page and "&lt;script&gt;" in page


def test_gate_notes_and_comparison_are_in_both() -> None:
    fields = {"gate": "psnr<30: psnr is 28", "note": "Simulated: in words", "warnings": ["few images"], "against": "other/metrics.json"}
    result = evaluation(**fields, comparison=compare({"psnr": 28.0, "ssim": None}, {"psnr": 29.5, "ssim": 0.5}))
    for text in (render_html(result, {}), render_markdown(result, {})):
        for expected in ("psnr is 28", "Simulated: in words", "few images", "other/metrics.json", "-1.5"):
            assert expected in text
    assert set(result.comparison) == {"psnr"}


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (0.123456, "0.1235"), (12345.6, "12346"), (3, "3"), (1e-7, "1e-07")])
def test_numbers(value: Any, text: str) -> None:
    assert number(value) == text


def test_metrics_json_round_trip(tmp_path: Any) -> None:
    (tmp_path / "metrics.json").write_text(evaluation().model_dump_json(by_alias=True))
    assert read_evaluation(tmp_path).metrics == evaluation().metrics
    assert read_evaluation(tmp_path / "metrics.json").protocol == evaluation().protocol
    for broken in ("{", "[]", '{"psnr": 1}'):
        (tmp_path / "metrics.json").write_text(broken)
        with pytest.raises(InputError, match=r"no metrics\.json"):
            read_evaluation(tmp_path)


def test_small_images_are_enlarged_by_whole_pixels() -> None:
    pixels = torch.arange(4).reshape(1, 2, 2) / 3
    grid = charts.image_grid({"a": [charts.to_picture(pixels)] * 3, "b": [charts.to_picture(pixels)]})
    assert len(set(grid.crop((78, 0, 78 + 96, 96)).convert("L").tobytes())) == 4, "no pixel is interpolated"


def test_the_difference_map_is_black_where_images_agree() -> None:
    a = torch.zeros(3, 4, 4)
    b = a.clone()
    b[:, 1, 2] = 0.25
    picture = charts.difference_map(a, b)
    lit = [(x, y) for x in range(4) for y in range(4) if picture.getpixel((x, y)) != (0, 0, 0)]
    assert lit == [(2, 1)] and picture.getpixel((2, 1))[0] == 255


def test_charts_are_pictures() -> None:
    rows = [{"timestep": 999.0 - 50 * k, "noise_error": 0.1, "latent_error": 0.01 * k} for k in range(20)]
    layers = [{"name": f"l{k}", "bits_w": 2 + k % 7, "weight_sqnr_db": 20.0, "output_error": 0.1 * k} for k in range(90)]
    for data in (charts.timestep_chart(rows), charts.layer_chart(layers)):
        assert Image.open(io.BytesIO(data)).size[0] > 800
