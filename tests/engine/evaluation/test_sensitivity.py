"""The sensitivity table against errors computed by hand in float64, and its page."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from qdm_cli.engine.context import RunContext
from qdm_cli.engine.diffusion.sampling import generate
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore
from qdm_cli.engine.evaluation import sensitivity
from qdm_cli.engine.evaluation.sensitivity import FIRST_SAMPLE, measure
from qdm_cli.engine.evaluation.sensitivity_page import render_page
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant.calibration import RangeRule, code_layer, run_denoiser
from qdm_cli.engine.quant.report import dequantized_weight
from qdm_cli.engine.quant.rules import resolve
from qdm_cli.engine.quant.sensitivity import Sensitivity, read_sensitivity
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.stages.calibrate import capture

BITS = (3, 8)
CONV, LINEAR, SKIPPED = "down_blocks.0.resnets.0.conv1", "mid_block.attentions.0.to_q", "conv_in"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Loaded tiny model, its captured calls and the table with both kinds of errors."""
    work = tmp_path_factory.mktemp("sensitivity")
    calibrate = {"method": "mse", "data": {"samples": 2, "batch": 2}, "sensitivity_samples": 2, "sensitivity_bits": BITS}
    policy = {"policy": "all", "rules": [{"match": SKIPPED, "skip": True}]}
    recipe = Recipe.model_validate({"model": {"id": "tiny:ddpm"}, "sampler": {"steps": 3}, "calibrate": calibrate, "quantize": policy})
    ctx = RunContext(recipe, work)
    ctx.resume.mkdir()
    loaded = load_pipeline(recipe.model, recipe.sampler)
    before = {name: value.clone() for name, value in loaded.denoiser.state_dict().items()}
    decisions = resolve(loaded.denoiser, recipe.quantize)
    store = TrajectoryStore(capture(loaded, recipe.calibrate, ctx, ctx.resume / "trajectories", samples=recipe.calibrate.data.samples))
    chosen = [d for d in decisions if d.name in (CONV, LINEAR, SKIPPED)]
    spec = recipe.calibrate.model_copy(update={"sensitivity": "end_to_end"})
    table = measure(loaded, chosen, spec, ctx, store)
    assert all(torch.equal(value, before[name]) for name, value in loaded.denoiser.state_dict().items()), "the model was changed"
    return SimpleNamespace(table=table, loaded=loaded, decisions=chosen, spec=spec, ctx=ctx, store=store)


def entry(table: Sensitivity, name: str, bits: int) -> Any:
    (layer,) = (layer for layer in table.layers if layer.name == name)
    return layer.at(bits)


def coded(bench: Any, name: str, bits: int) -> torch.Tensor:
    decision = replace(next(d for d in bench.decisions if d.name == name), bits_w=bits, skipped_why=None)
    return dequantized_weight(code_layer(bench.loaded.denoiser.get_submodule(name), decision, RangeRule("mse"), None)).double()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [CONV, LINEAR, SKIPPED])
def test_output_and_weight_errors_in_float64(bench: Any, name: str, bits: int) -> None:
    layer = bench.loaded.denoiser.get_submodule(name)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    for record in bench.store.records:
        run_denoiser(bench.loaded.denoiser, bench.store.arguments(record))
    handle.remove()
    weight, own = layer.weight.double(), coded(bench, name, bits)
    op = F.linear if weight.ndim == 2 else lambda x, w: F.conv2d(x, w, None, layer.stride, layer.padding)
    bias = layer.bias.double() if weight.ndim == 2 else layer.bias.double()[:, None, None]
    error = sum((op(x, own) - op(x, weight)).square().sum() for x in inputs)
    signal = sum((op(x, weight) + bias).square().sum() for x in inputs)
    found = entry(bench.table, name, bits)
    assert found.output_error == pytest.approx(float((error / signal).sqrt()), rel=1e-4)
    assert found.weight_mse == pytest.approx(float((weight - own).square().mean()), rel=1e-5)
    assert found.weight_sqnr_db == pytest.approx(float(10 * (weight.square().sum() / (weight - own).square().sum()).log10()), rel=1e-5)
    ranges = next(row for row in bench.table.layers if row.name == name).input_ranges
    assert ranges == [pytest.approx((float(x.min()), float(x.max())), rel=1e-5) for x in reversed(inputs)]


@pytest.mark.parametrize("bits", BITS)
def test_activation_error_rounds_the_input_alone(bench: Any, bits: int) -> None:
    layer = bench.loaded.denoiser.get_submodule(LINEAR)
    inputs: list[torch.Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].double()))
    for record in bench.store.records:
        run_denoiser(bench.loaded.denoiser, bench.store.arguments(record))
    handle.remove()
    error = signal = 0.0
    for x in inputs:
        low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
        scale = (high - low) / (2**bits - 1)
        zero = torch.round(torch.tensor(-low / scale))
        rounded = (torch.clamp(torch.round(x / scale) + zero, 0, 2**bits - 1) - zero) * scale
        y = F.linear(x, layer.weight.double(), layer.bias.double())
        error += float((F.linear(rounded, layer.weight.double(), layer.bias.double()) - y).square().sum())
        signal += float(y.square().sum())
    assert entry(bench.table, LINEAR, bits).activation_error == pytest.approx((error / signal) ** 0.5, rel=0.02)


def test_the_image_error_is_that_of_one_layer_alone(bench: Any) -> None:
    recipe, denoiser = bench.ctx.recipe, bench.loaded.denoiser
    arguments: dict[str, Any] = {"count": 2, "batch": 2, "start": FIRST_SAMPLE, "seed": recipe.seed, "output": "latent"}
    truth = generate(bench.loaded, recipe.sampler, **arguments).double()
    weight = denoiser.get_submodule(CONV).weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(coded(bench, CONV, 3))
        own = generate(bench.loaded, recipe.sampler, **arguments).double()
        weight.copy_(kept)
    found = entry(bench.table, CONV, 3)
    assert found.image_mse == pytest.approx(float((own - truth).square().mean()), rel=1e-3)
    assert found.image_error == pytest.approx(float((own - truth).norm() / truth.norm()), rel=1e-3)
    assert found.image_error > 10 * entry(bench.table, CONV, 8).image_error


def test_a_finished_unit_is_not_measured_again(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(sensitivity, "_image_errors", refuse)
    monkeypatch.setattr(sensitivity, "run_denoiser", refuse)
    assert measure(bench.loaded, bench.decisions, bench.spec, bench.ctx, bench.store) == bench.table
    (bench.ctx.resume / "sensitivity-3.json").rename(bench.ctx.resume / "kept.json")
    with pytest.raises(AssertionError, match="measured again"):
        measure(bench.loaded, bench.decisions, bench.spec, bench.ctx, bench.store)
    (bench.ctx.resume / "kept.json").rename(bench.ctx.resume / "sensitivity-3.json")


def test_layers_in_full_precision_are_in_the_table_without_bits(bench: Any) -> None:
    assert {row.name: row.bits_w for row in bench.table.layers} == {SKIPPED: None, CONV: 4, LINEAR: 4}


def test_the_page_shows_every_layer_and_loads_nothing(bench: Any) -> None:
    page = render_page(bench.table.model_copy(update={"rules": [{"match": "<b>", "weights": 4}]}))
    assert all(f"<code>{row.name}</code>" in page for row in bench.table.layers)
    assert "Error of the final image" in page and "&lt;b&gt;" in page
    assert not re.search(r"(src|href)=|@import|url\(", page)
    fast = bench.table.model_copy(
        update={
            "layers": [
                row.model_copy(update={"widths": [e.model_copy(update={"image_error": None}) for e in row.widths]})
                for row in bench.table.layers
            ]
        }
    )
    assert "Error of the final image" not in render_page(fast)


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: str | None) -> None:
    from qdm_cli.engine.errors import InputError

    if content is not None:
        (tmp_path / "sensitivity.json").write_text(content)
    with pytest.raises(InputError, match="cannot be read" if content is None else "is no sensitivity.json"):
        read_sensitivity(tmp_path)
