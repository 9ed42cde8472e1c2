"""The wheel holds what is tracked and nothing else; importing and asking for help is free."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"qdm_cli/": "qdm_cli/", "kernels/qdm_kernels/": "qdm_kernels/", "recipes/": "qdm_cli/recipes/"}


def run(*command: str | Path, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=200)
    assert done.returncode == 0, f"{command} exited {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def tracked_files() -> list[str]:
    names = run("git", "ls-files", "-z").stdout.split("\0")
    return [name for name in names if name and (ROOT / name).is_file()]


def wheel_path(name: str) -> str | None:
    """Where a tracked file lies in the wheel; None = it is not shipped."""
    for source, target in PLACES.items():
        if name.startswith(source):
            return target + name[len(source) :]
    return None


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Built from a copy of the tracked files, so that neither stray files nor an old `build/` reach it."""
    copy = tmp_path_factory.mktemp("clone")
    for name in tracked_files():
        target = copy / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy, cwd=copy)
    (path,) = out.glob("qdm-*.whl")
    return zipfile.ZipFile(path)


def metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = (item for item in wheel.namelist() if item.endswith(f".dist-info/{name}"))
    return wheel.read(path).decode()


def test_wheel_holds_the_tracked_files_and_no_others(wheel: zipfile.ZipFile) -> None:
    expected = {path for name in tracked_files() if (path := wheel_path(name))}
    shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert shipped == expected, f"add to pyproject.toml: {sorted(expected - shipped)}; should not be there: {sorted(shipped - expected)}"


def test_wheel_holds_every_byte(wheel: zipfile.ZipFile) -> None:
    for name in tracked_files():
        if path := wheel_path(name):
            assert wheel.read(path) == (ROOT / name).read_bytes(), name


def test_wheel_metadata(wheel: zipfile.ZipFile) -> None:
    about = message_from_string(metadata(wheel, "METADATA"))
    assert (about["Name"], about["License-Expression"]) == ("qdm", "Apache-2.0")
    assert "qdm = qdm_cli.main:main" in metadata(wheel, "entry_points.txt")
    assert metadata(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()
    needs = about.get_all("Requires-Dist") or []
    assert not [need for need in needs if "sdnq" in need]
    assert [need for need in needs if need.startswith("torchvision") and 'extra == "eval"' not in need] == []


def pyproject() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11")
    data: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
    return data


def test_package_list_is_the_tree() -> None:
    sources = (path for name in tracked_files() if name.endswith(".py") and (path := wheel_path(name)))
    tree = {".".join(Path(path).parent.parts) for path in sources}
    listed = set(pyproject()["tool"]["setuptools"]["packages"])
    assert listed == tree, f"packages in pyproject.toml: add {sorted(tree - listed)}, remove {sorted(listed - tree)}"


def test_version_is_said_once() -> None:
    version = run(sys.executable, "-c", "import qdm_cli; print(qdm_cli.__version__)").stdout.strip()
    assert version == pyproject()["project"]["version"]


def test_kernels_folder_is_not_a_package() -> None:
    """`kernels` is another published package, which diffusers and transformers import if they find it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = "import importlib.util; s = importlib.util.find_spec('kernels'); print(s.origin if s else None)"
    origin = run(sys.executable, "-c", code).stdout.strip()
    assert origin == "None" or not Path(origin).is_relative_to(ROOT / "kernels")


HEAVY = ("torch", "diffusers", "transformers", "scipy", "matplotlib")
REPORT = f"import sys; print('LOADED', *sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"


def loaded_by(code: str) -> list[str]:
    """Heavy packages that a fresh interpreter has imported after `code`."""
    report = run(sys.executable, "-c", f"{code}\n{REPORT}").stderr
    (line,) = (line for line in report.splitlines() if line.startswith("LOADED"))
    return line.split()[1:]


def test_import_is_free() -> None:
    assert loaded_by("import qdm_cli") == []
    assert loaded_by("import qdm_cli, qdm_cli.engine.recipe, qdm_cli.engine.errors, qdm_cli.engine.context") == []


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["ls"], ["validate", "quickstart"]], ids=" ".join)
@pytest.mark.skipif(not (ROOT / "qdm_cli" / "main.py").exists(), reason="no main yet")
def test_asking_is_free(arguments: list[str]) -> None:
    code = f"import runpy, sys\nsys.argv = ['qdm', *{arguments!r}]\ntry:\n    runpy.run_module('qdm_cli', run_name='__main__')\n"
    assert loaded_by(code + "except SystemExit as stop:\n    assert not stop.code, stop.code") == []
