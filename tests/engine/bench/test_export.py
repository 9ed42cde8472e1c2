"""`qdm bench FOLDER`."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import DDIMPipeline, DDIMScheduler

from qdm_cli.engine.bench.export import bench_export
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.runtime.folder import packed_tensors, write_component, write_pipeline


@pytest.fixture
def exported(tmp_path: Path, tiny_unet, make_state) -> Path:
    state = make_state(tiny_unet, bits_w=8)
    pipeline = DDIMPipeline(unet=tiny_unet, scheduler=DDIMScheduler())
    write_component(tmp_path / "export" / "unet", tiny_unet, *packed_tensors(tiny_unet, state))
    write_pipeline(tmp_path / "export", pipeline, "unet", None)
    return tmp_path / "export"


def test_latency_memory_and_kernels(exported: Path, make_state, tiny_unet) -> None:
    report = bench_export(exported, device="cpu", rounds=3)
    facts = report["facts"]
    assert facts["denoiser_p10_ms"] <= facts["denoiser_median_ms"] <= facts["denoiser_p90_ms"]
    assert min(facts["load_s"], facts["first_call_s"], facts["weights_mb"], facts["peak_memory_mb"]) > 0
    assert sum(group["count"] for group in report["layers"]) == len(make_state(tiny_unet, bits_w=8).layers)
    assert all((group["kernel"] == "float") == bool(group["why_not"]) for group in report["layers"])


def test_a_folder_that_is_no_export_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no diffusers pipeline"):
        bench_export(tmp_path, device="cpu")
