"""Bytes, bits, operations and timing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qdm_cli.engine.evaluation import cost
from qdm_cli.engine.evaluation.subject import Subject
from qdm_cli.engine.models import LoadedPipeline


class Denoiser(nn.Module):
    """One convolution, one projection, one attention product."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.proj = nn.Linear(6, 10, bias=False)

    def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        tokens = self.proj(self.conv(sample).flatten(2).transpose(1, 2))
        return tokens @ tokens.transpose(1, 2)


def subject(denoiser: nn.Module, kind: Any = "base", folder: Path | None = None, layers: list[dict] | None = None) -> Subject:
    loaded = LoadedPipeline(pipeline=SimpleNamespace(), component="unet", denoiser=denoiser, identity={})
    return Subject(loaded, kind, "model", "d", folder, layers or [])


LAYERS = [
    {"name": "conv", "bits_w": 4, "bits_a": 8, "skipped_why": None},
    {"name": "proj", "bits_w": 8, "bits_a": None, "skipped_why": None},
]
CONV_MACS = 6 * 8 * 8 * (2 * 9)
PROJ_MACS = 64 * 6 * 10
ATTENTION_MACS = 64 * 64 * 10


@pytest.mark.parametrize("batch", [1, 3])
def test_operations_are_counted_per_image(batch: int) -> None:
    base, own = subject(Denoiser()), subject(Denoiser(), "exported", layers=LAYERS)
    found = cost.operations(base, own, ((torch.randn(batch, 4, 8, 8), 1.0), {}), batch)
    assert found["macs_g"] * 1e9 == pytest.approx(CONV_MACS + PROJ_MACS + ATTENTION_MACS)
    bops = CONV_MACS * 4 * 8 + PROJ_MACS * 8 * 32 + ATTENTION_MACS * 32 * 32
    assert found["bops_g"] * 1e9 == pytest.approx(bops)
    assert found["bops_vs_fp32"] == pytest.approx(bops / (CONV_MACS + PROJ_MACS + ATTENTION_MACS) / 1024)
    assert cost.operations(base, base, ((torch.randn(batch, 4, 8, 8), 1.0), {}), batch)["bops_vs_fp32"] == 1


def test_mean_bits_count_floats_as_16() -> None:
    base = subject(Denoiser())
    conv, proj = base.denoiser.conv.weight.numel(), base.denoiser.proj.weight.numel()
    assert cost.mean_weight_bits(base, subject(Denoiser(), layers=LAYERS)) == pytest.approx((conv * 4 + proj * 8) / (conv + proj))
    skipped = [{**LAYERS[0], "skipped_why": "edge"}, LAYERS[1]]
    assert cost.mean_weight_bits(base, subject(Denoiser(), layers=skipped)) == pytest.approx((conv * 16 + proj * 8) / (conv + proj))
    assert cost.mean_weight_bits(base, base) == 16


def test_sizes_come_from_the_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "vae").mkdir()
    for name, size in (("unet/a-1.safetensors", 700), ("unet/a-2.safetensors", 300), ("unet/config.json", 50), ("vae/a.safetensors", 9000)):
        (tmp_path / name).write_bytes(b"x" * size)
    base = subject(Denoiser())
    parameters = sum(p.numel() for p in base.denoiser.parameters())
    found = cost.sizes(base, subject(Denoiser(), "exported", tmp_path))
    assert found["size_mb"] == pytest.approx(1e-3)
    assert found["size_fp16_mb"] == pytest.approx(parameters * 2e-6) and found["size_fp32_mb"] == pytest.approx(parameters * 4e-6)
    assert found["size_vs_fp16"] == pytest.approx(1000 / (2 * parameters))
    lone = tmp_path / "unet"
    assert cost.weight_file_bytes(lone, "unet") == 1000


def test_a_simulated_model_has_no_size_or_speed() -> None:
    simulated = subject(Denoiser(), "simulated")
    found = cost.sizes(subject(Denoiser()), simulated)
    assert found["size_mb"] is None and "simulated" in found["size_mb_why"]


class Sleeper(nn.Module):
    """Each call is written down; the n-th takes n-dependent time."""

    def __init__(self, name: str, calls: list[str]) -> None:
        super().__init__()
        self.name, self.calls = name, calls

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        self.calls.append(self.name)
        return sample


def test_models_are_timed_in_turns_and_warm_up_is_apart() -> None:
    calls: list[str] = []
    models = {name: subject(Sleeper(name, calls)) for name in ("base", "own")}
    times = cost.latencies(models, ((torch.zeros(1),), {}), repeats=4, device="cpu")
    assert calls == ["base", "own"] * (cost.WARM_UP + 4)
    assert {name: len(values) for name, values in times.items()} == {"base": 4, "own": 4}
    assert all(value > 0 for values in times.values() for value in values)


def test_resident_bytes_count_kernel_layouts_and_shared_tensors_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    layer.register_buffer("scale", torch.zeros(4))
    assert cost.resident_bytes(layer) == 64 + 16
    layer._prepared = SimpleNamespace(
        codes=torch.zeros(16, dtype=torch.int8), state=[layer.scale, {"sums": torch.zeros(4, dtype=torch.int32)}]
    )
    assert cost.resident_bytes(layer) == 64 + 16 + 16 + 16


def test_device_facts_name_the_processor() -> None:
    facts = cost.device_facts("cpu")
    assert facts["device"] and facts["threads"] == torch.get_num_threads()
