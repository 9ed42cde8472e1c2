"""Loading: what is accepted, what is refused and with which exit code. No test reaches the network."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models import LoadedPipeline, find_denoiser, load_pipeline
from qdm_cli.engine.models.schedulers import with_scheduler
from qdm_cli.engine.models.source import builtin_folder
from qdm_cli.engine.models.tiny import build_tiny
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

UNET = "unet/diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "someone/ddpm-model"


def load(place: Path | str, sampler: SamplerSpec | None = None, *, offline: bool = True, **model: object) -> LoadedPipeline:
    return load_pipeline(ModelSpec.model_validate({"id": str(place), **model}), sampler or SamplerSpec(), offline=offline)


def test_loaded_pipeline_is_quiet_frozen_and_in_evaluation_mode(ddpm_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    loaded = load(ddpm_folder)
    assert loaded.component == "unet"
    assert loaded.denoiser is loaded.pipeline.unet
    assert not loaded.denoiser.training
    assert not any(parameter.requires_grad for parameter in loaded.denoiser.parameters())
    assert loaded.identity["class"] == "DDIMPipeline"
    loaded.pipeline(num_inference_steps=1, output_type="pt")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_weights_are_aligned(ddpm_folder: Path) -> None:
    """Mapped weights start anywhere, and products differ in the last bits with that."""
    assert {parameter.data_ptr() % 64 for parameter in load(ddpm_folder).denoiser.parameters()} == {0}


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("source", ["folder", "tiny"])
def test_dtype(ddpm_folder: Path, dtype: str, source: str) -> None:
    loaded = load(ddpm_folder if source == "folder" else "tiny:ddpm", dtype=dtype)
    assert {str(parameter.dtype) for parameter in loaded.denoiser.parameters()} == {f"torch.{dtype}"}


def test_old_layout_with_the_model_at_the_root(ddpm_folder: Path) -> None:
    """google/ddpm-* keep the one model and the scheduler beside model_index.json."""
    for part in ("unet", "scheduler"):
        for file in (ddpm_folder / part).iterdir():
            file.rename(ddpm_folder / file.name)
        (ddpm_folder / part).rmdir()
    assert torch.equal(load(ddpm_folder).denoiser.conv_in.weight, load("tiny:ddpm").denoiser.conv_in.weight)


def test_half_precision_variant_alone(ddpm_folder: Path) -> None:
    (ddpm_folder / UNET).rename(ddpm_folder / UNET.replace(".safetensors", ".fp16.safetensors"))
    assert load(ddpm_folder).component == "unet"


def test_sharded_weights(tmp_path: Path) -> None:
    build_tiny("ddpm").save_pretrained(tmp_path, max_shard_size="1MB")
    shards = sorted(tmp_path.glob("unet/*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load(tmp_path).denoiser.conv_in.weight, load("tiny:ddpm").denoiser.conv_in.weight)
    shards[1].unlink()
    with pytest.raises(InputError, match=shards[1].name):
        load(tmp_path)


def test_safety_checker_and_its_missing_files_are_no_obstacle(tiny_folders, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_folders("sd"), tmp_path / "sd")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
        "requires_safety_checker": True,
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    assert load(folder).pipeline.safety_checker is None


# refused input


@pytest.mark.parametrize("name", ["nowhere", "/no/such/folder", "./model", "a/b/c"])
def test_missing_folder(name: str, tmp_cwd: Path) -> None:
    with pytest.raises(InputError, match="no folder") as caught:
        load(name)
    assert caught.value.exit_code == 2


def test_folder_that_is_no_pipeline(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"model_index\.json"):
        load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"_class_name": "NoSuchPipeline"}'])
def test_broken_index(ddpm_folder: Path, text: str) -> None:
    (ddpm_folder / "model_index.json").write_text(text)
    with pytest.raises(InputError, match=r"model_index\.json"):
        load(ddpm_folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1000, -1])
def test_truncated_weights_are_named(ddpm_folder: Path, keep: int) -> None:
    path = ddpm_folder / UNET
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=r"diffusion_pytorch_model\.safetensors is (truncated|corrupt)"):
        load(ddpm_folder)


def test_overwritten_header_is_corrupt(ddpm_folder: Path) -> None:
    path = ddpm_folder / UNET
    content = bytearray(path.read_bytes())
    content[8:40] = b"\xff" * 32
    path.write_bytes(content)
    with pytest.raises(InputError, match="corrupt"):
        load(ddpm_folder)


def test_weights_of_another_shape(ddpm_folder: Path) -> None:
    tensors = load_file(ddpm_folder / UNET)
    tensors["conv_in.weight"] = torch.zeros(32, 3, 5, 5)
    save_file(tensors, ddpm_folder / UNET, metadata={"format": "pt"})
    with pytest.raises(InputError, match="cannot be loaded as DDIMPipeline"):
        load(ddpm_folder)


@pytest.mark.parametrize("suffix", [".bin", ".ckpt", ".pt"])
def test_pickles_are_never_read(ddpm_folder: Path, suffix: str) -> None:
    (ddpm_folder / UNET).rename((ddpm_folder / UNET).with_suffix(suffix))
    with pytest.raises(InputError, match="never unpickles"):
        load(ddpm_folder)
    with pytest.raises(InputError, match="never unpickles"):
        load(f"model{suffix}")


def test_weights_that_are_not_there(ddpm_folder: Path) -> None:
    (ddpm_folder / UNET).unlink()
    with pytest.raises(InputError, match="no weights of unet"):
        load(ddpm_folder)


@pytest.mark.parametrize(
    "change",
    [
        {"_class_name": ["my_pipeline", "MyPipeline"]},
        {"unet": ["my_unet", "MyUNet"]},
        {"unet": ["os", "system"]},
    ],
    ids=["pipeline", "component", "foreign library"],
)
def test_code_from_the_folder_never_runs(ddpm_folder: Path, change: dict[str, object]) -> None:
    for name in ("my_pipeline.py", "unet/my_unet.py"):
        (ddpm_folder / name).write_text("raise SystemExit('code of the model folder ran')")
    index = json.loads((ddpm_folder / "model_index.json").read_text())
    (ddpm_folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(InputError, match=r"never runs code|diffusers and transformers only"):
        load(ddpm_folder)


def test_pipeline_without_denoiser(ddpm_folder: Path) -> None:
    index = json.loads((ddpm_folder / "model_index.json").read_text())
    index = {key: value for key, value in index.items() if key != "unet"}
    (ddpm_folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"no denoiser .*scheduler"):
        load(ddpm_folder)


def test_quantized_model_is_no_starting_point(ddpm_folder: Path) -> None:
    path = ddpm_folder / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "qdm"}}))
    with pytest.raises(InputError, match="quantized already"):
        load(ddpm_folder)


def test_wrong_component_is_refused_with_the_choice() -> None:
    with pytest.raises(InputError, match=r"transformer.*scheduler, unet"):
        find_denoiser(build_tiny("ddpm"), "transformer")


def test_builtin_model_loads_in_float32() -> None:
    loaded = load("builtin:fashion-unet32")
    assert loaded.identity["class"] == "DDIMPipeline"
    assert loaded.identity["license"] == "apache-2.0"
    assert loaded.denoiser.config.in_channels == 1
    assert {str(parameter.dtype) for parameter in loaded.denoiser.parameters()} == {"torch.float32"}


def test_builtin_names() -> None:
    with pytest.raises(InputError, match="builtin:fashion-unet32"):
        builtin_folder("fashion-unet")


# hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty Hugging Face cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Online as far as the hub client knows, with a hub at a port where nobody listens."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.usefixtures("no_route")
def test_hub_that_does_not_answer(hub_cache: Path, ddpm_folder: Path) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"{HUB_ID}.*cannot be reached"):
        load(HUB_ID, offline=False)
    cached_model(hub_cache, ddpm_folder)
    assert load(HUB_ID, offline=False).identity["revision"] == COMMIT


def cached_model(cache: Path, folder: Path) -> Path:
    """`folder` as commit COMMIT of HUB_ID in a Hugging Face cache; returns the snapshot."""
    home = cache / f"models--{HUB_ID.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text(COMMIT)
    return Path(shutil.copytree(folder, home / "snapshots" / COMMIT))


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_hub_id_without_network(hub_cache: Path, offline: bool) -> None:
    with pytest.raises(EnvironmentProblem, match=rf"{HUB_ID}.*not in the local cache") as caught:
        load(HUB_ID, offline=offline)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
@pytest.mark.parametrize("revision", [None, "main", COMMIT])
def test_cached_hub_model_loads_without_network(hub_cache: Path, ddpm_folder: Path, offline: bool, revision: str | None) -> None:
    cached_model(hub_cache, ddpm_folder)
    loaded = load(HUB_ID, offline=offline, revision=revision)
    assert loaded.identity["revision"] == COMMIT
    assert torch.equal(loaded.denoiser.conv_in.weight, load("tiny:ddpm").denoiser.conv_in.weight)


def test_cached_configuration_without_weights(hub_cache: Path, ddpm_folder: Path) -> None:
    (cached_model(hub_cache, ddpm_folder) / UNET).unlink()
    with pytest.raises(EnvironmentProblem, match=HUB_ID):
        load(HUB_ID)


def test_cached_hub_model_with_code_is_refused(hub_cache: Path, ddpm_folder: Path) -> None:
    snapshot = cached_model(hub_cache, ddpm_folder)
    (snapshot / "model_index.json").write_text('{"_class_name": ["evil", "Evil"]}')
    with pytest.raises(InputError, match="never runs code"):
        load(HUB_ID)


# scheduler


def test_scheduler_is_swapped_and_keeps_the_noise_schedule() -> None:
    own = load("tiny:sd").pipeline.scheduler
    swapped = load("tiny:sd", SamplerSpec(scheduler="DPMSolverMultistepScheduler")).pipeline.scheduler
    assert type(swapped).__name__ == "DPMSolverMultistepScheduler"
    assert swapped.config.beta_schedule == own.config.beta_schedule == "scaled_linear"


def test_unknown_scheduler_is_refused_with_a_guess() -> None:
    with pytest.raises(InputError, match="Did you mean 'DDIMScheduler'") as caught:
        load("tiny:ddpm", SamplerSpec(scheduler="DDIMSheduler"))
    assert caught.value.problems[0].hint == "DDIMScheduler"
    with pytest.raises(InputError, match="no scheduler"):
        load("tiny:ddpm", SamplerSpec(scheduler="UNet2DModel"))


@pytest.mark.parametrize(
    ("scheduler", "expected"),
    [("DDIMScheduler", "DDIMPipeline"), ("DDPMScheduler", "DDPMPipeline"), ("DPMSolverMultistepScheduler", "DDPMPipeline")],
)
def test_pixel_models_get_the_pipeline_of_their_sampler(scheduler: str, expected: str) -> None:
    pipeline = load("tiny:ddpm", SamplerSpec(scheduler=scheduler)).pipeline
    assert type(pipeline).__name__ == expected
    assert type(pipeline.scheduler).__name__ == scheduler
    assert type(with_scheduler(pipeline, "DDIMScheduler")).__name__ == "DDIMPipeline"


@pytest.mark.parametrize(
    ("model", "scheduler"),
    [
        ("tiny:ddpm", "EulerDiscreteScheduler"),
        ("tiny:dit", "EulerDiscreteScheduler"),
        ("tiny:flux", "DDIMScheduler"),
        ("tiny:flux", "FlowMatchHeunDiscreteScheduler"),
        ("tiny:sd3", "EulerDiscreteScheduler"),
        ("tiny:sd", "FlowMatchEulerDiscreteScheduler"),
    ],
)
def test_unfit_scheduler_is_refused(model: str, scheduler: str) -> None:
    with pytest.raises(InputError, match=f"{scheduler} does not fit"):
        load(model, SamplerSpec(scheduler=scheduler))


# LoRA


def test_lora_on_a_pipeline_that_takes_none() -> None:
    with pytest.raises(InputError, match="takes no LoRA"):
        load("tiny:ddpm", loras=[{"path": "x.safetensors"}])


@pytest.mark.skipif(importlib.util.find_spec("peft") is not None, reason="peft is installed")
def test_lora_without_peft_gives_the_pip_line() -> None:
    with pytest.raises(EnvironmentProblem, match="pip install"):
        load("tiny:sd", loras=[{"path": "x.safetensors"}])


@pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs peft")
def test_lora_is_merged_with_its_scale(tmp_path: Path) -> None:
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = load("tiny:sd").denoiser.get_submodule(layer).weight
    down, up = torch.randn(4, base.shape[1]), torch.randn(base.shape[0], 4)
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}, file)
    merged = load("tiny:sd", loras=[{"path": str(file), "scale": 0.5}]).denoiser.get_submodule(layer)
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged.weight, base + 0.5 * up @ down)
    with pytest.raises(InputError, match="no file"):
        load("tiny:sd", loras=[{"path": str(tmp_path / "nothing.safetensors")}])
