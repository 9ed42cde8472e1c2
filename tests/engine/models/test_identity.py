"""Fingerprints: equal for equal models, different after any change that matters."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from qdm_cli.engine.models import load_pipeline, model_digest
from qdm_cli.engine.recipe.schema import Lora, ModelSpec, SamplerSpec


def digest(place: Path | str, **model: object) -> str:
    return model_digest(ModelSpec(id=str(place), **model), offline=True)


def test_digest_is_the_content_and_not_the_place(ddpm_folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(ddpm_folder, tmp_path / "elsewhere")
    assert digest(copy) == digest(ddpm_folder)
    assert load_pipeline(ModelSpec(id=str(ddpm_folder)), SamplerSpec()).identity["digest"] == digest(ddpm_folder)


def test_one_changed_weight_changes_it(ddpm_folder: Path) -> None:
    before = digest(ddpm_folder)
    path = ddpm_folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert digest(ddpm_folder) != before


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json"])
def test_a_changed_configuration_changes_it(ddpm_folder: Path, name: str) -> None:
    before = digest(ddpm_folder)
    config = json.loads((ddpm_folder / name).read_text())
    (ddpm_folder / name).write_text(json.dumps({**config, "beta_end": 0.03, "norm_eps": 1e-3}))
    assert digest(ddpm_folder) != before


def test_the_model_card_does_not_change_it_and_gives_the_license(ddpm_folder: Path) -> None:
    before = digest(ddpm_folder)
    (ddpm_folder / "README.md").write_text("---\ntags: [x]\nlicense: apache-2.0\n---\n# Model\n")
    assert digest(ddpm_folder) == before
    assert load_pipeline(ModelSpec(id=str(ddpm_folder)), SamplerSpec()).identity["license"] == "apache-2.0"


def test_tiny_models_and_loras_are_told_apart(tmp_path: Path) -> None:
    assert len({digest("tiny:ddpm"), digest("tiny:sd"), digest("tiny:sd", loras=(Lora(path="a/b"),))}) == 3
    file = tmp_path / "lora.safetensors"
    file.write_bytes(b"one")
    first = digest("tiny:sd", loras=(Lora(path=str(file)),))
    file.write_bytes(b"two!")
    assert digest("tiny:sd", loras=(Lora(path=str(file)),)) != first


def test_smoke_has_the_digest_of_the_stand_in() -> None:
    assert model_digest(ModelSpec(id="google/ddpm-cifar10-32"), smoke=True) == digest("tiny:ddpm")
