"""The denoiser without weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdm_cli.engine.errors import InputError
from qdm_cli.engine.models import layer_roles, meta_denoiser
from qdm_cli.engine.models.tiny import TINY, tiny_class, tiny_denoiser
from qdm_cli.engine.recipe.schema import ModelSpec


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("kind", ["tiny", "folder"])
def test_meta_denoiser_has_the_layers_and_shapes_of_the_real_one(name: str, kind: str, tiny_folders) -> None:
    place = f"tiny:{name}" if kind == "tiny" else str(tiny_folders(name))
    component, module, class_name = meta_denoiser(ModelSpec(id=place), offline=True)
    real = tiny_denoiser(name)
    assert class_name == tiny_class(name)
    assert component == ("transformer" if "Transformer" in type(real).__name__ else "unet")
    assert layer_roles(module) == layer_roles(real)
    assert {key: value.shape for key, value in module.named_parameters()} == {key: value.shape for key, value in real.named_parameters()}
    assert all(value.is_meta for value in (*module.parameters(), *module.buffers()))


def test_no_weight_file_is_needed(ddpm_folder: Path) -> None:
    for file in ddpm_folder.rglob("*.safetensors"):
        file.unlink()
    assert meta_denoiser(ModelSpec(id=str(ddpm_folder)))[0] == "unet"


def test_missing_configuration_is_named(ddpm_folder: Path) -> None:
    (ddpm_folder / "unet" / "config.json").unlink()
    with pytest.raises(InputError, match=r"unet/config\.json"):
        meta_denoiser(ModelSpec(id=str(ddpm_folder)))
