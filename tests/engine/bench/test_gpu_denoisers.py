"""Whole denoisers are packed in place and reported part by part; a fake stands in for the GPU, so times mean nothing here."""

from __future__ import annotations

import pytest
import torch

from qdm_cli.engine.bench import gpu_denoisers
from qdm_cli.engine.bench.gpu_denoisers import GpuBench, measure_on_gpu
from qdm_cli.engine.models.published import CONFIGS, Published
from qdm_cli.engine.runtime import choice, gpu
from qdm_cli.engine.runtime.choice import Machine
from qdm_cli.engine.runtime.packed import PackedLayer

TINY = {
    "sample_size": 8,
    "block_out_channels": [32, 64],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 32,
    "attention_head_dim": 2,
    "norm_num_groups": 8,
}
FLUX = {
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "axes_dims_rope": [4, 4, 8],
    "guidance_embeds": True,
    "in_channels": 16,
}


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, result in {"synchronize": None, "empty_cache": None, "memory_allocated": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda result=result: result)
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(gpu, "possible", lambda: True)
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device, op: cls("cuda", (9, 0), triton=True)))
    monkeypatch.setattr(choice, "_CUDA", ())
    monkeypatch.setitem(CONFIGS, "tiny", Published("UNet2DConditionModel", TINY, 0, 8))
    monkeypatch.setitem(CONFIGS, "flux", Published("FluxTransformer2DModel", FLUX, 0, 8))


@pytest.mark.parametrize(("name", "bits"), [("tiny", 4), ("flux", 8)])
def test_a_denoiser_is_timed_packed_and_timed_again(name: str, bits: int, as_on_a_gpu) -> None:
    said: list[str] = []
    bench = GpuBench(bits, steps=3, seconds=0.0, dtype=torch.float32, device="cpu", unfused=True)
    *_, row = measure_on_gpu(name, bench, said.append)
    assert row["gate"] == "passed"
    assert row["ratios"]["eager"] > 0
    assert "error" in row["qdm"]["graph"]  # no CUDA here: reported, not raised
    assert row["errors_qdm"]["to_float_model"] < (0.2 if bits == 8 else 0.6)
    assert row["rows"] == 3
    assert row["errors_unfused"]["to_truth"] < 2e-3
    assert row["layers"]["integer"] > 10


def test_a_wrong_product_is_not_timed(as_on_a_gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_denoisers.in_float_arithmetic

    def broken(model: torch.nn.Module):
        last = [layer for layer in model.modules() if isinstance(layer, PackedLayer)][-1]
        last.load_buffer_("weight_scale", last.weight_scale * 3)
        return right(model)

    monkeypatch.setattr(gpu_denoisers, "in_float_arithmetic", broken)
    *_, row = measure_on_gpu("tiny", GpuBench(8, steps=2, seconds=0.0, dtype=torch.float32, device="cpu"), lambda text: None)
    assert row["gate"] == "failed"
    assert "qdm" not in row
    assert row["ratios"] == {}
