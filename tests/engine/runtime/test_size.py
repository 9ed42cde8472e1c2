"""Predicted bytes against files, lossless halving, and what is linked from the base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import UNet2DModel
from safetensors.torch import load_file

from qdm_cli.engine.runtime.folder import _link_files, compact, packed_tensors, stored_table, weight_files, write_component
from qdm_cli.engine.runtime.size import bytes_by_part, predicted_bytes


def decisions_of(state) -> list:
    return [layer.decision for layer in state.layers.values()] + list(state.skipped)


@pytest.mark.parametrize(
    "policy",
    [
        {},
        {"bits_w": 8, "symmetric": True},
        {"bits_a": None},
        {"act_mode": "dynamic"},
        {"bits_w": 3, "bits_a": 3},
        {"skip": "attn", "split": True},
    ],
)
def test_predicted_bytes_are_those_of_the_file(policy: dict, tmp_path: Path, tiny_unet, make_state) -> None:
    state = make_state(tiny_unet, **policy)
    write_component(tmp_path, tiny_unet, *_compacted(tiny_unet, state))
    (file,) = weight_files(tmp_path)
    with init_empty_weights():
        meta = UNet2DModel.from_config(tiny_unet.config)
    predicted = predicted_bytes(decisions_of(state), meta, rows=5)
    assert sum(predicted.values()) == pytest.approx(file.stat().st_size, rel=0.01)
    measured = bytes_by_part(stored_table(tmp_path), decisions_of(state))
    assert {k: v for k, v in predicted.items() if k != "header"} == {k: v for k, v in measured.items() if k != "header"}
    assert predicted["header"] == pytest.approx(measured["header"], rel=0.02)


def _compacted(unet, state):
    tensors, config = packed_tensors(unet, state)
    return {name: compact(name, value) for name, value in tensors.items()}, config


def test_float_parameters_that_are_no_fp16_numbers_take_four_bytes(tmp_path: Path, tiny_unet, make_state) -> None:
    with torch.no_grad():
        for parameter in tiny_unet.parameters():
            parameter.add_(1e-5)
    state = make_state(tiny_unet)
    write_component(tmp_path, tiny_unet, *_compacted(tiny_unet, state))
    predicted = predicted_bytes(decisions_of(state), tiny_unet, rows=5, float_bytes=4)
    assert sum(predicted.values()) == pytest.approx(weight_files(tmp_path)[0].stat().st_size, rel=0.01)


def test_halving_loses_nothing() -> None:
    exact, inexact = torch.tensor([1.5, -0.25, 65504.0]), torch.tensor([1.5, 0.1])
    assert compact("norm.weight", exact).dtype == torch.float16
    assert compact("norm.weight", inexact).dtype == torch.float32
    assert compact("norm.weight", torch.tensor([1e-9])).dtype == torch.float32
    assert compact("layer.weight_scale", exact).dtype == torch.float32
    assert compact("layer.act_scale", exact).dtype == torch.float32
    assert compact("layer.weight", torch.tensor([3], dtype=torch.int8)).dtype == torch.int8


def test_trained_floats_are_stored_as_trained(tmp_path: Path, tiny_unet, make_state) -> None:
    state = make_state(tiny_unet)
    trained = torch.randn(16, generator=torch.Generator().manual_seed(0))
    state.floats["conv_norm_out.weight"] = trained
    write_component(tmp_path, tiny_unet, *_compacted(tiny_unet, state))
    stored = load_file(weight_files(tmp_path)[0])["conv_norm_out.weight"]
    assert torch.equal(stored, trained)


def test_large_files_are_linked_small_ones_copied_and_pickles_left(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "model.safetensors").write_bytes(b"x" * 2**21)
    (source / "model.fp16.safetensors").write_bytes(b"y" * 2**21)
    (source / "pytorch_model.bin").write_bytes(b"z")
    _link_files(source, target)
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "model.safetensors"]
    assert (target / "model.safetensors").samefile(source / "model.safetensors")
    assert not (target / "config.json").samefile(source / "config.json")


def test_a_variant_that_is_alone_is_linked_under_the_plain_name(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    names = [
        "model.fp16-00001-of-00002.safetensors",
        "model.fp16-00002-of-00002.safetensors",
        "model.safetensors.index.fp16.json",
        "config.json",
    ]
    for name in names:
        (source / name).write_text("{}")
    _link_files(source, target)
    expected = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert sorted(path.name for path in target.iterdir()) == expected
