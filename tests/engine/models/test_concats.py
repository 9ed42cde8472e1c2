"""Split indices against the concatenations that a forward really makes."""

import pytest
import torch
from accelerate import init_empty_weights

from qdm_cli.engine.models import load_pipeline
from qdm_cli.engine.models.concats import shortcut_splits
from qdm_cli.engine.recipe.schema import ModelSpec, SamplerSpec


def concatenations(denoiser, run) -> dict[str, int]:
    """Module path of each residual block whose input is a concatenation -> channels of its first part."""
    real, made = torch.cat, {}

    def cat(tensors, *args, **kwargs):
        result = real(tensors, *args, **kwargs)
        made[id(result)] = (result, tensors[0].shape[1])  # kept alive, or another tensor could reuse the id
        return result

    found = {}

    def enter(module, args, name):
        if id(args[0]) in made:
            found[f"{name}.conv_shortcut"] = made[id(args[0])][1]

    for name, module in denoiser.named_modules():
        if hasattr(module, "conv_shortcut"):
            module.register_forward_pre_hook(lambda module, args, name=name: enter(module, args, name))
    torch.cat = cat
    try:
        run()
    finally:
        torch.cat = real
    return found


@pytest.mark.parametrize("model", ["tiny:ddpm", "tiny:ldm", "tiny:sd", "tiny:sdxl", "tiny:fashion", "builtin:fashion-unet32"])
def test_splits_are_those_of_the_forward(model):
    loaded = load_pipeline(ModelSpec(id=model), SamplerSpec(steps=1), offline=True)
    splits = shortcut_splits(loaded.denoiser)
    from qdm_cli.engine.diffusion.sampling import step_timesteps

    assert splits and splits == concatenations(loaded.denoiser, lambda: step_timesteps(loaded, SamplerSpec(steps=1)))


@pytest.mark.parametrize("model", ["tiny:dit", "tiny:sd3", "tiny:flux", "tiny:pixart"])
def test_transformers_have_none(model):
    assert shortcut_splits(load_pipeline(ModelSpec(id=model), SamplerSpec(steps=1), offline=True).denoiser) == {}


def test_without_a_middle_block_and_on_the_meta_device():
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            mid_block_type=None,
            layers_per_block=1,
        )
    assert shortcut_splits(unet) == {
        "up_blocks.0.resnets.0.conv_shortcut": 16,
        "up_blocks.0.resnets.1.conv_shortcut": 16,
        "up_blocks.1.resnets.0.conv_shortcut": 16,
        "up_blocks.1.resnets.1.conv_shortcut": 8,
    }
