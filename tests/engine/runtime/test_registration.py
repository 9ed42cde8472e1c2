"""`import qdm_cli` lets stock diffusers open a qdm folder, whoever is imported first. Every order needs an interpreter of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import json, sys
sys.path[:0] = {roots!r}
def report():
    from diffusers.quantizers import auto
    import qdm_cli
    from diffusers import UNet2DModel
    import torch
    unet = UNet2DModel.from_pretrained({folder!r})
    value = float(unet(torch.ones(1, 3, 16, 16), 400).sample.sum())
    print(json.dumps({{"entries": [name for name in auto.AUTO_QUANTIZER_MAPPING if name == "qdm"],
        "config": "qdm" in auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "status": qdm_cli.registration_status(),
        "finders": sum(type(f).__module__.startswith("qdm_cli") for f in sys.meta_path), "value": value}}))
"""

ORDERS = {
    "qdm first, registered twice": "import qdm_cli; qdm_cli.register(); qdm_cli.register(); import diffusers; report()",
    "diffusers first": "import diffusers; import qdm_cli; report()",
    "the table first": "import diffusers.quantizers.auto; import qdm_cli; report()",
    "the plug-in first": "import qdm_cli.engine.runtime.plugin; report()",
}


@pytest.fixture(scope="module")
def roots(repo_root: Path) -> list[str]:
    return [str(repo_root), str(repo_root / "kernels")]


@pytest.fixture
def exported(tmp_path: Path, tiny_unet, make_state) -> Path:
    from qdm_cli.engine.runtime.folder import packed_tensors, write_component

    write_component(tmp_path / "unet", tiny_unet, *packed_tensors(tiny_unet, make_state(tiny_unet)))
    return tmp_path / "unet"


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("order", ORDERS)
def test_all_import_orders(order: str, exported: Path, roots: list[str], tiny_unet, make_state) -> None:
    import torch

    from qdm_cli.engine.quant.state_apply import apply_state_

    done = python(PRELUDE.format(roots=roots, folder=str(exported)) + ORDERS[order])
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    apply_state_(tiny_unet, make_state(tiny_unet))
    value = float(tiny_unet(torch.ones(1, 3, 16, 16), 400).sample.sum())
    assert (got["entries"], got["config"], got["finders"]) == (["qdm"], True, 0)
    assert got["status"] == {"state": "registered", "why": None}
    assert got["value"] == pytest.approx(value, rel=1e-5)


def test_without_the_import_diffusers_says_so_itself(exported: Path) -> None:
    code = f"import sys; sys.modules['qdm_cli'] = None\nfrom diffusers import UNet2DModel\nUNet2DModel.from_pretrained({str(exported)!r})"
    done = python(code)
    assert done.returncode != 0
    # the text of the model card and the FAQ
    assert "ValueError: Unknown quantization type, got qdm - supported types are: [" in done.stderr


def test_importing_qdm_imports_neither_torch_nor_diffusers(roots: list[str]) -> None:
    code = (
        f"import sys; sys.path[:0] = {roots!r}; import qdm_cli; print([m for m in ('torch', 'diffusers', 'pydantic') if m in sys.modules])"
    )
    done = python(code + "; print(qdm_cli.registration_status()['state'])")
    assert done.stdout.split("\n")[:2] == ["[]", "waiting"], done.stderr


def test_a_later_diffusers_without_the_tables_is_reported_not_fatal(tmp_path: Path, roots: list[str]) -> None:
    """A stand-in package whose quantizer table is gone: importing it must work, and the reason must be told."""
    package = tmp_path / "diffusers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "diffusers" / "__init__.py").write_text("from . import quantizers")
    (package / "__init__.py").write_text("from . import auto")
    (package / "auto.py").write_text("from .base import DiffusersQuantizer\nfrom .quantization_config import QuantizationConfigMixin\n")
    (package / "base.py").write_text("class DiffusersQuantizer: pass")
    (package / "quantization_config.py").write_text("class QuantizationConfigMixin: pass")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{roots!r}]\nimport qdm_cli, diffusers\nprint(qdm_cli.registration_status())"
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert "'failed'" in done.stdout and "AUTO_QUANTIZER_MAPPING" in done.stdout


def test_the_finder_waits_again_after_a_failed_import(tmp_path: Path, roots: list[str]) -> None:
    package = tmp_path / "diffusers" / "quantizers"
    package.mkdir(parents=True)
    (tmp_path / "diffusers" / "__init__.py").write_text("")
    (package / "__init__.py").write_text("")
    (package / "auto.py").write_text("raise ImportError('not today')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, *{roots!r}]\nimport qdm_cli\n"
    code += "for _ in range(2):\n    try: import diffusers.quantizers.auto\n    except ImportError as error: print(error)\n"
    done = python(code + "print(qdm_cli.registration_status()['state'])")
    assert done.stdout.split("\n")[:3] == ["not today", "not today", "waiting"], done.stderr
