from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory):
    """Saved tiny pipelines by name, written on demand; never change them in place."""
    from qdm_cli.engine.models.tiny import build_tiny

    root = tmp_path_factory.mktemp("tiny")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            build_tiny(name).save_pretrained(root / name)
        return root / name

    return folder


@pytest.fixture
def ddpm_folder(tiny_folders, tmp_path: Path) -> Path:
    """A copy of the saved tiny:ddpm that a test may damage."""
    return Path(shutil.copytree(tiny_folders("ddpm"), tmp_path / "model"))
