"""Exported denoisers through stock diffusers: types after loading, step hook, saving again, refusals."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from safetensors.torch import load_file, save_file

import qdm_cli
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.state_apply import apply_state_
from qdm_cli.engine.runtime import gpu
from qdm_cli.engine.runtime.choice import Machine
from qdm_cli.engine.runtime.folder import compact, packed_tensors, write_component, write_pipeline, write_weights
from qdm_cli.engine.runtime.graphs import Graphs
from qdm_cli.engine.runtime.loading import graphed
from qdm_cli.engine.runtime.packed import PackedLayer


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.fixture
def exported(tmp_path: Path, tiny_unet, make_state) -> Path:
    """A whole pipeline; weight scales of one layer are too small for fp16."""
    state = make_state(tiny_unet)
    state.layers["conv_out"].weight_scale.mul_(1e-6)
    pipeline = DDIMPipeline(unet=tiny_unet, scheduler=DDIMScheduler())
    write_pipeline(tmp_path / "export", pipeline, "unet", None)
    tensors, config = packed_tensors(tiny_unet, state)
    write_component(tmp_path / "export" / "unet", tiny_unet, {name: compact(name, value) for name, value in tensors.items()}, config)
    return tmp_path / "export"


def packed_layers(unet: torch.nn.Module) -> dict[str, PackedLayer]:
    return {name: module for name, module in unet.named_modules() if isinstance(module, PackedLayer)}


def test_load_gives_the_simulated_outputs(exported: Path, tiny_unet, make_state, x: torch.Tensor) -> None:
    state = make_state(tiny_unet)
    state.layers["conv_out"].weight_scale.mul_(1e-6)
    apply_state_(tiny_unet, state)
    unet = qdm_cli.load(exported, mode="exact").unet
    assert len(packed_layers(unet)) == len(state.layers)
    for timestep in (800, 333.3, torch.tensor([10, 790])):
        assert torch.equal(unet(x, timestep).sample, tiny_unet(x, timestep).sample)


def test_load_is_all_that_a_fresh_process_calls(exported: Path) -> None:
    """As README shows it: nothing of diffusers is imported before."""
    code = f"import qdm_cli; print(type(qdm_cli.load({str(exported)!r})).__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stdout.strip()) == (0, "DDIMPipeline"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_stay_float32_in_every_load_dtype(exported: Path, dtype: torch.dtype, x: torch.Tensor) -> None:
    full = UNet2DModel.from_pretrained(exported / "unet")
    unet = UNet2DModel.from_pretrained(exported / "unet", torch_dtype=dtype)
    assert unet.dtype == dtype
    assert {p.dtype for p in unet.parameters()} == {dtype}
    for name, layer in packed_layers(unet).items():
        for leaf, value in layer.named_buffers():
            assert value.dtype in (torch.float32, torch.int8, torch.uint8)
            assert torch.equal(value, full.get_submodule(name).get_buffer(leaf))
    y = unet(x.to(dtype), 400).sample
    assert y.dtype == dtype and bool(torch.isfinite(y).all())


def test_casts_are_refused_and_moves_are_not(exported: Path) -> None:
    unet = UNet2DModel.from_pretrained(exported / "unet")
    for cast in (lambda: unet.to(torch.float16), unet.half, lambda: unet.to(dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match=r"quantized model"):
            cast()
    unet.to("cpu")


def test_saving_a_loaded_model_and_loading_it_again(exported: Path, tmp_path: Path, x: torch.Tensor) -> None:
    first = qdm_cli.load(exported)
    first.save_pretrained(tmp_path / "again")
    second = qdm_cli.load(tmp_path / "again")
    assert torch.equal(first.unet(x, 600).sample, second.unet(x, 600).sample)
    own, again = (load_file(folder / "unet" / "diffusion_pytorch_model.safetensors") for folder in (exported, tmp_path / "again"))
    assert own.keys() == again.keys()
    assert all(own[name].dtype == again[name].dtype and torch.equal(own[name], again[name]) for name in own)


def test_every_step_of_the_pipeline_reads_its_row(exported: Path) -> None:
    """The pipeline passes the timestep by position; each call must see the row of its own step."""
    pipeline = qdm_cli.load(exported)
    pipeline.set_progress_bar_config(disable=True)
    layer, seen = pipeline.unet.get_submodule("down_blocks.0.resnets.0.conv1"), []
    layer.register_forward_pre_hook(lambda module, args: seen.append(float(module.step.pick(module.act_scale))))
    pipeline.scheduler.config.timestep_spacing = "leading"
    pipeline(num_inference_steps=5, output_type="np")
    assert seen == layer.act_scale.tolist()


def test_a_copy_of_a_loaded_model_has_a_step_of_its_own(exported: Path, x: torch.Tensor) -> None:
    import copy

    unet = UNet2DModel.from_pretrained(exported / "unet")
    want = unet(x, 800).sample
    twin = copy.deepcopy(unet)
    unet(x, 0)
    assert torch.equal(twin(x, 800).sample, want)
    assert twin.conv_in.step is not unet.conv_in.step


def edit_config(exported: Path, **changes) -> None:
    path = exported / "unet" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= changes
    path.write_text(json.dumps(config))


def test_keys_of_later_versions_are_ignored_and_a_newer_schema_is_not(exported: Path, x: torch.Tensor) -> None:
    edit_config(exported, invented_later={"a": 1})
    assert UNet2DModel.from_pretrained(exported / "unet")(x, 0).sample.shape == x.shape
    edit_config(exported, schema=3)
    with pytest.raises(InputError, match="newer qdm"):
        qdm_cli.load(exported)


def test_missing_and_misshapen_tensors_are_named(exported: Path) -> None:
    path = exported / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    table = tensors.pop("conv_in.act_scale")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"conv_in\.act_scale"):
        qdm_cli.load(exported)
    save_file(tensors | {"conv_in.act_scale": table.repeat(3)}, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"conv_in\.act_scale has shape \(3,\)"):
        qdm_cli.load(exported)


def test_a_truncated_file_is_an_input_error(exported: Path) -> None:
    path = exported / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be loaded"):
        qdm_cli.load(exported)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qdm.json": '{"kind": "calibrated"}'}, "qdm export RECIPE --from"),
        ({"qdm.json": '{"kind": "finetuned"}'}, "finetuned artifact"),
        ({"qdm.json": '{"kind": "exported"}', "config.json": "{}"}, "denoiser alone"),
        ({"notes.txt": ""}, "no diffusers pipeline"),
        ({"qdm.json": "{"}, "no diffusers pipeline"),
    ],
    ids=["calibrated", "finetuned", "component", "other", "broken manifest"],
)
def test_load_says_what_to_do_with_other_folders(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        qdm_cli.load(tmp_path)


def test_load_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        qdm_cli.load(tmp_path / "nowhere")


def test_sharded_weights_load(exported: Path, x: torch.Tensor) -> None:
    folder = exported / "unet"
    want = UNet2DModel.from_pretrained(folder)(x, 200).sample
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    write_weights(folder, tensors, shard_size="40KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 1
    assert torch.equal(UNet2DModel.from_pretrained(folder)(x, 200).sample, want)


def test_the_version_is_the_packages(repo_root: Path) -> None:
    assert f'version = "{qdm_cli.__version__}"' in (repo_root / "pyproject.toml").read_text()


def test_the_mode_of_a_loaded_pipeline(exported: Path, x: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDM_MODE")
    modes = {
        mode: {layer.mode for layer in packed_layers(qdm_cli.load(exported, mode=mode).unet).values()} for mode in (None, "auto", "exact")
    }
    assert modes == {None: {"auto"}, "auto": {"auto"}, "exact": {"exact"}}
    with pytest.raises(InputError, match="auto or exact, got 'fast'"):
        qdm_cli.load(exported, mode="fast")
    monkeypatch.setenv("QDM_MODE", "exact")
    unet = type(qdm_cli.load(exported).unet).from_pretrained(exported / "unet")
    assert {layer.mode for layer in packed_layers(unet).values()} == {"exact"}


def test_graphs_come_by_themselves_on_a_gpu_alone(
    exported: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert qdm_cli.load(exported).unet._compiled_call_impl is None
    monkeypatch.setattr(gpu, "is_gpu", lambda device: device.type == "cpu")
    monkeypatch.setattr(Machine, "of", classmethod(lambda cls, device, op: cls("cuda", (9, 0), triton=True)))
    with caplog.at_level(logging.INFO):
        assert isinstance(qdm_cli.load(exported).unet._compiled_call_impl, Graphs)
        assert qdm_cli.load(exported, graphs=False).unet._compiled_call_impl is None
    assert caplog.text.count("replayed from CUDA graphs") == 1
    monkeypatch.setattr("qdm_cli.engine.runtime.graphs.why_not", lambda denoiser: "it is offloaded")
    with caplog.at_level(logging.INFO):
        assert qdm_cli.load(exported).unet._compiled_call_impl is None
    assert "no CUDA graphs: it is offloaded" in caplog.text
    with pytest.raises(InputError, match="it is offloaded"):
        qdm_cli.load(exported, graphs=True)


def test_graphs_are_switched_on_by_load_once_with_or_without_a_cache(exported: Path, x: torch.Tensor) -> None:
    pipeline = qdm_cli.load(exported, device="cpu", graphs=True)
    want = qdm_cli.load(exported).unet(x, 400).sample
    assert torch.equal(pipeline.unet(x, 400).sample, want)  # not on a GPU: as without
    with pytest.raises(InputError, match="switched on already"):
        graphed(pipeline)
    cached = qdm_cli.load(exported)
    qdm_cli.cached(cached, interval=2).enable()
    assert torch.equal(graphed(cached).unet(x, 400).sample, want)
    with pytest.raises(InputError, match="switched on already"):
        graphed(cached)
