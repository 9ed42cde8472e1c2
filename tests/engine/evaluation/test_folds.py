"""Errors of layers whose channels' factors lie in the norm before them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qdm_cli.engine.evaluation.folds import _ratio, fold_factors, times_channels
from qdm_cli.engine.evaluation.subject import Subject
from qdm_cli.engine.evaluation.trace import layer_rows, trace
from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.quant.calibration import RangeRule, code_layer
from qdm_cli.engine.quant.fold_norms import folded_parameters
from qdm_cli.engine.quant.report import layer_rows as manifest_rows
from qdm_cli.engine.quant.state import LayerDecision, QuantState, read_state, write_state
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

LAYER, NORM = "down_blocks.0.attentions.0.proj_in", "down_blocks.0.attentions.0.norm"


def subjects(tmp_path, factors: torch.Tensor) -> tuple[Subject, Subject]:
    """A tiny pipeline, and the same with one layer in 8 bits whose factors lie in its norm."""
    base, other = (load_pipeline(ModelSpec(id="tiny:sd"), SamplerSpec(steps=2), offline=True) for _ in range(2))
    layer = base.denoiser.get_submodule(LAYER)
    kind = "Conv2d" if isinstance(layer, nn.Conv2d) else "Linear"
    decision = LayerDecision(LAYER, kind, tuple(layer.weight.shape), "other", bits_w=8, folded_into=NORM)
    codes = code_layer(layer, decision, RangeRule("max"), None, factors)
    write_state(tmp_path, QuantState({LAYER: codes}, floats=folded_parameters(base.denoiser.get_submodule(NORM), NORM, factors)))
    state = read_state(tmp_path)
    apply_state_(other.denoiser, state)
    return Subject(base, "base", "base", "0"), Subject(other, "simulated", "other", "1", layers=manifest_rows(state))


def test_errors_of_a_folded_layer_are_those_of_its_quantization(tmp_path) -> None:
    width = load_pipeline(ModelSpec(id="tiny:sd"), SamplerSpec(steps=2), offline=True).denoiser.get_submodule(NORM).num_channels
    factors = torch.linspace(0.25, 4, width)
    base, other = subjects(tmp_path, factors)
    torch.testing.assert_close(fold_factors(base, other)[LAYER], factors)
    found = trace(base, other, SamplerSpec(steps=2), count=2, batch=2, seed=0, prompts=["a", "b"])
    row = next(row for row in layer_rows(base, other, found.layers) if row["name"] == LAYER)
    assert 38 < row["weight_sqnr_db"] < 60, "8 bits; against W itself it is below 10 dB"
    assert 0 < row["output_error"] < 0.02, "on the input that the layer has in its own model"


def test_a_gain_of_zero_leaves_the_bias_to_tell_the_factor() -> None:
    before, after = nn.GroupNorm(1, 3), nn.GroupNorm(1, 3)
    with torch.no_grad():
        before.weight.copy_(torch.tensor([2.0, 0.0, 0.0]))
        before.bias.copy_(torch.tensor([1.0, 3.0, 0.0]))
        after.weight.copy_(torch.tensor([1.0, 0.0, 0.0]))
        after.bias.copy_(torch.tensor([0.5, 12.0, 0.0]))
    assert _ratio(before, after).tolist() == [0.5, 4.0, 1.0]


@pytest.mark.parametrize("layer", [nn.Conv2d(3, 2, 1), nn.Linear(3, 2)], ids=["conv", "linear"])
def test_channels_of_an_input(layer: nn.Module) -> None:
    x = torch.ones(2, 3, 4, 4) if isinstance(layer, nn.Conv2d) else torch.ones(2, 4, 3)
    y = times_channels(x.half(), torch.tensor([1.0, 2.0, 3.0]), layer)
    assert y.dtype == torch.float16 and y.movedim(1 if x.ndim == 4 else -1, 0)[1].unique().tolist() == [2.0]
