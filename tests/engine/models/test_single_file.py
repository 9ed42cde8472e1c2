"""One .safetensors file in the key names of the Stable Diffusion authors, written here from tiny:sd."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_cli.engine.models import layer_roles, load_pipeline, meta_denoiser, model_digest
from qdm_cli.engine.models.tiny import build_tiny
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec

FAMILY = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# tiny:sd has one block per level: levels of the encoder start at input block 1 and 3, of the decoder at output block 0 and 2
_UNET = (
    (r"^time_embedding\.linear_(\d)", lambda m: f"time_embed.{2 * int(m[1]) - 2}"),
    (r"^conv_in", "input_blocks.0.0"),
    (r"^conv_norm_out", "out.0"),
    (r"^conv_out", "out.2"),
    (r"^down_blocks\.(\d)\.resnets\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.0"),
    (r"^down_blocks\.(\d)\.attentions\.0", lambda m: f"input_blocks.{2 * int(m[1]) + 1}.1"),
    (r"^down_blocks\.(\d)\.downsamplers\.0\.conv", lambda m: f"input_blocks.{2 * int(m[1]) + 2}.0.op"),
    (r"^mid_block\.resnets\.(\d)", lambda m: f"middle_block.{2 * int(m[1])}"),
    (r"^mid_block\.attentions\.0", "middle_block.1"),
    (r"^up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.0"),
    (r"^up_blocks\.(\d)\.attentions\.(\d)", lambda m: f"output_blocks.{2 * int(m[1]) + int(m[2])}.1"),
    (r"^up_blocks\.0\.upsamplers\.0\.conv", "output_blocks.1.1.conv"),
    (rf"^(?!.*transformer_blocks)(.*)\.({'|'.join(_RESNET)})\.", lambda m: f"{m[1]}.{_RESNET[m[2]]}."),
)
_VAE = (
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"down_blocks\.(\d)\.resnets\.(\d)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"up.{1 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)


def renamed(tensors: dict[str, torch.Tensor], rules, prefix: str) -> dict[str, torch.Tensor]:
    """Apply each rule once per name."""
    result = {}
    for name, value in tensors.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        result[prefix + name] = value[..., None, None] if re.search(r"attn_1\.([qkv]|proj_out)\.weight", name) else value.contiguous()
    return result


@pytest.fixture
def single_file(tmp_path: Path, tiny_folders, monkeypatch: pytest.MonkeyPatch) -> Path:
    """tiny:sd as one file, beside a Hugging Face cache with the configuration files of its family."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    home = tmp_path / "hub" / f"models--{FAMILY.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("a" * 40)
    shutil.copytree(tiny_folders("sd"), home / "snapshots" / ("a" * 40), ignore=shutil.ignore_patterns("*.safetensors"))
    pipeline = build_tiny("sd")
    tensors = renamed(pipeline.unet.state_dict(), _UNET, "model.diffusion_model.")
    tensors |= renamed(pipeline.vae.state_dict(), _VAE, "first_stage_model.")
    text = pipeline.text_encoder.state_dict()
    tensors |= {f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}": value for key, value in text.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_single_file_gives_the_pipeline_it_was_made_from(single_file: Path) -> None:
    loaded = load_pipeline(ModelSpec(id=str(single_file)), SamplerSpec(scheduler="DDIMScheduler"), offline=True)
    origin = build_tiny("sd")
    assert loaded.identity["class"] == "StableDiffusionPipeline"
    for part in ("unet", "vae", "text_encoder"):
        expected = getattr(origin, part).state_dict()
        found = getattr(loaded.pipeline, part).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in expected), part


def test_meta_denoiser_and_digest_of_a_single_file(single_file: Path) -> None:
    model = ModelSpec(id=str(single_file))
    component, module, class_name = meta_denoiser(model, offline=True)
    assert (component, class_name) == ("unet", "StableDiffusionPipeline")
    assert layer_roles(module) == layer_roles(build_tiny("sd").unet)
    before = model_digest(model, offline=True)
    single_file.write_bytes(single_file.read_bytes()[:-1] + b"\x7f")
    assert model_digest(model, offline=True) != before


def test_denoiser_alone_is_no_pipeline(single_file: Path) -> None:
    save_file(renamed(build_tiny("sd").unet.state_dict(), _UNET, "model.diffusion_model."), single_file)
    with pytest.raises(InputError, match="whole StableDiffusionPipeline"):
        load_pipeline(ModelSpec(id=str(single_file)), SamplerSpec(), offline=True)


def test_missing_or_truncated(tmp_path: Path) -> None:
    model = ModelSpec(id=str(tmp_path / "model.safetensors"))
    with pytest.raises(InputError, match="no file"):
        load_pipeline(model, SamplerSpec(), offline=True)
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00\x00")
    with pytest.raises(InputError, match="truncated"):
        load_pipeline(model, SamplerSpec(), offline=True)


@pytest.mark.parametrize("offline", [True, False], ids=["offline", "unreachable"])
def test_the_family_configuration_it_lacks_is_named(single_file: Path, offline: bool) -> None:
    shutil.rmtree(single_file.parent / "hub")
    with pytest.raises(EnvironmentProblem, match=FAMILY):
        load_pipeline(ModelSpec(id=str(single_file)), SamplerSpec(), offline=offline)
