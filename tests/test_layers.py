"""The one-way rules of the house, read from the imports of every shipped file (module level and inside functions).

`main -> commands -> report -> engine.run -> engine.stages -> engine.methods -> the six sibling packages -> qdm_kernels -> torch`

An import under `if TYPE_CHECKING:` does not run: inside engine it may point upwards, and it may name any third-party package.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

SIBLINGS = {"quant", "caching", "diffusion", "models", "runtime", "evaluation"}
PUBLIC = {"load", "register", "cached", "__version__"}  # names of qdm_cli/__init__.py
FREE = {"spec", "errors", "context", "checkpoint", "artifact"}  # usable by all of engine
BELOW_METHODS = SIBLINGS | {"free", "zoo", "qdm_kernels"}
BELOW_RUN = BELOW_METHODS | {"recipe", "methods", "stages"}
ENGINE = BELOW_RUN | {"run", "plan", "bench", "engine"}

# layer -> the layers it may import; its own layer is always allowed.
ALLOWED: dict[str, set[str]] = {
    "qdm_kernels": set(),
    "free": {"qdm_kernels"},
    "zoo": {"free"},
    "zoo script": BELOW_METHODS,
    **dict.fromkeys(SIBLINGS, BELOW_METHODS),
    "recipe": SIBLINGS | {"free", "methods"},  # configuration classes live beside the code they configure
    "methods": BELOW_METHODS | {"recipe"},
    "stages": BELOW_RUN,
    "run": BELOW_RUN,
    "plan": BELOW_RUN | {"run"},
    "bench": BELOW_RUN | {"run", "plan"},
    "engine": ENGINE,
    "report": ENGINE,
    "commands": ENGINE | {"report"},
    "root": ENGINE,
    "main": ENGINE | {"report", "commands"},
    "__main__": {"main"},
}

TERMINAL = ("qdm_cli.main", "qdm_cli.report", "qdm_cli.commands")
# third-party package -> the modules that may import it.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "typer": TERMINAL,
    "rich": TERMINAL,
    "omegaconf": ("qdm_cli.engine.recipe",),
    "ruamel": ("qdm_cli.engine.recipe",),
    "diffusers": ("qdm_cli.engine.models", "qdm_cli.engine.runtime", "qdm_cli.engine.caching.runtime", "qdm_cli.engine.zoo"),
}
NEVER = {"click", "sdnq", "pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNPICKLERS = {f"torch{part}.{verb}" for part in ("", ".jit", ".serialization") for verb in ("load", "save")}


@dataclass(frozen=True)
class Import:
    module: str  # the importer
    target: str
    where: str  # file:line
    type_only: bool = False


@dataclass(frozen=True)
class Tree:
    root: Path
    modules: dict[str, Path]
    imports: list[Import]
    violations: list[str]  # found while reading: calls that pickle


def module_files(root: Path) -> dict[str, Path]:
    """Dotted name -> file, over `qdm_cli` and `kernels/qdm_kernels`."""
    found = {}
    for base, package in ((root, "qdm_cli"), (root / "kernels", "qdm_kernels")):
        for path in sorted((base / package).rglob("*.py")):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


class Reader(ast.NodeVisitor):
    """Imports and pickling calls of one file."""

    def __init__(self, module: str, path: Path, root: Path, modules: dict[str, Path]) -> None:
        self.module, self.path, self.root, self.modules = module, path, root, modules
        self.imports: list[Import] = []
        self.violations: list[str] = []
        self.alias: dict[str, str] = {}
        self.type_only = False

    def where(self, node: ast.AST) -> str:
        return f"{self.path.relative_to(self.root)}:{getattr(node, 'lineno', 0)}"

    def add(self, target: str, node: ast.AST) -> None:
        self.imports.append(Import(self.module, target, self.where(node), self.type_only))

    def visit_Import(self, node: ast.Import) -> None:
        for name in node.names:
            self.alias[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
            self.add(name.name, node)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        base = node.module or ""
        if node.level:
            package = self.module.split(".") if self.path.name == "__init__.py" else self.module.split(".")[:-1]
            base = ".".join(package[: len(package) - node.level + 1] + ([node.module] if node.module else []))
        for name in node.names:
            full = f"{base}.{name.name}"
            self.alias[name.asname or name.name] = full
            self.add(full if full in self.modules or base in {"torch", "qdm_cli"} else base, node)

    def visit_If(self, node: ast.If) -> None:
        if not ast.unparse(node.test).endswith("TYPE_CHECKING"):
            return self.generic_visit(node)
        self.type_only = True
        for child in node.body:
            self.visit(child)
        self.type_only = False
        for child in node.orelse:
            self.visit(child)

    def dotted(self, node: ast.AST) -> str:
        """`a.b.c` with the first name replaced by what it was imported as; empty for anything else."""
        if isinstance(node, ast.Name):
            return self.alias.get(node.id, node.id)
        if isinstance(node, ast.Attribute):
            head = self.dotted(node.value)
            return f"{head}.{node.attr}" if head else ""
        return ""

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if self.dotted(node) in UNPICKLERS:
            self.violations.append(f"{self.where(node)}: {self.dotted(node)} pickles; use safetensors")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        if self.dotted(node.func) in {"importlib.import_module", "__import__"} and node.args:
            name = node.args[0]
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                self.add(name.value, node)
        for keyword in node.keywords:
            if keyword.arg == "allow_pickle" and not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False):
                self.violations.append(f"{self.where(node)}: allow_pickle reads pickles")
        self.generic_visit(node)


def read_tree(root: Path) -> Tree:
    modules = module_files(root)
    imports, violations = [], []
    for module, path in modules.items():
        reader = Reader(module, path, root, modules)
        reader.visit(ast.parse(path.read_text(encoding="utf-8"), filename=str(path)))
        imports += reader.imports
        violations += reader.violations
    return Tree(root, modules, imports, violations)


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def layer_of(module: str) -> str | None:
    """Key of ALLOWED; None for a module the table does not place."""
    parts = module.split(".")
    if parts[0] == "qdm_kernels":
        return "qdm_kernels"
    if len(parts) == 1 or parts[1] in PUBLIC:
        return "root"
    if parts[1] != "engine":
        return parts[1] if parts[1] in {"main", "__main__", "report", "commands"} else None
    if len(parts) == 2:
        return "engine"
    if parts[2] in FREE:
        return "free"
    if parts[2] == "zoo" and len(parts) > 3 and parts[3].startswith("train_"):
        return "zoo script"
    return parts[2] if parts[2] in ALLOWED else None


def peer_of(module: str, package: str) -> str | None:
    """The method or stage a module belongs to; None outside the package and for its shared helpers (`__init__`, `_x`, `registry`)."""
    if not module.startswith(package + "."):
        return None
    name = module[len(package) + 1 :].split(".")[0]
    return None if name.startswith("_") or name == "registry" else name


def unplaced(tree: Tree) -> Iterator[str]:
    for module, path in tree.modules.items():
        if layer_of(module) is None:
            yield f"{path.relative_to(tree.root)}:1: {module} has no place in the layer table"


def wrong_direction(tree: Tree) -> Iterator[str]:
    for item in tree.imports:
        if item.target.split(".")[0] not in {"qdm_cli", "qdm_kernels"}:
            continue
        source, target = layer_of(item.module), layer_of(item.target)
        if item.target == "qdm_cli.__version__" and source != "qdm_kernels":
            continue
        if item.type_only and {source, target} <= ENGINE - {"qdm_kernels"}:
            continue
        if source is not None and target != source and target not in ALLOWED[source]:
            yield f"{item.where}: {source} may not import {target or 'unplaced'} ({item.target})"


def peers(tree: Tree) -> Iterator[str]:
    for item in tree.imports:
        for package in ("qdm_cli.engine.methods", "qdm_cli.engine.stages"):
            source, target = peer_of(item.module, package), peer_of(item.target, package)
            if source and target and source != target:
                yield f"{item.where}: {package.split('.')[-1]} do not import each other ({item.target}); what they share moves down"


def third_party(tree: Tree) -> Iterator[str]:
    for item in tree.imports:
        top = item.target.split(".")[0]
        if top in NEVER:
            yield f"{item.where}: {top} is never imported"
        elif item.target in UNPICKLERS:
            yield f"{item.where}: {item.target} pickles; use safetensors"
        elif item.type_only:
            continue
        elif top == "triton" and not (item.module.startswith("qdm_kernels.") and item.module.endswith(".triton")):
            yield f"{item.where}: triton only in kernels/qdm_kernels/*/triton.py"
        elif top in ONLY_IN and not any(is_within(item.module, place) for place in ONLY_IN[top]):
            yield f"{item.where}: {top} only in {', '.join(ONLY_IN[top])}"


def sibling_edges(tree: Tree) -> dict[str, dict[str, str]]:
    """Package -> {imported package: first place}, over the six siblings."""
    edges: dict[str, dict[str, str]] = {name: {} for name in sorted(SIBLINGS)}
    for item in tree.imports:
        source, target = layer_of(item.module), layer_of(item.target)
        if source in SIBLINGS and target in SIBLINGS and source != target and not item.type_only:
            edges[source].setdefault(target, item.where)
    return edges


def sibling_cycles(tree: Tree) -> Iterator[str]:
    """Each cycle once, starting at its alphabetically first package."""
    edges = sibling_edges(tree)

    def walk(path: list[str]) -> Iterator[str]:
        for target, where in edges[path[-1]].items():
            if target == path[0]:
                steps = [edges[a][b] for a, b in pairwise(path)] + [where]
                yield f"{where}: cycle {' -> '.join([*path, target])} ({', '.join(steps)})"
            elif target > path[0] and target not in path:
                yield from walk([*path, target])

    for start in edges:
        yield from walk([start])


def violations(root: Path) -> list[str]:
    tree = read_tree(root)
    rules = (unplaced, wrong_direction, peers, third_party, sibling_cycles)
    return sorted(set(tree.violations) | {line for rule in rules for line in rule(tree)})


def test_the_house_keeps_its_layers() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_it_reads_the_whole_house() -> None:
    modules = module_files(ROOT)
    assert "qdm_cli.engine.checkpoint" in modules
    assert all(path.suffix == ".py" for path in modules.values())
    assert len(read_tree(ROOT).imports) > len(modules)


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, source in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf-8")
    return root


FAULTS = {
    "kernels know nothing of the tool": (
        "kernels/qdm_kernels/layout.py",
        "from qdm_cli.engine import errors",
        "qdm_kernels may not import free",
    ),
    "kernels do not ask for the version": (
        "kernels/qdm_kernels/layout.py",
        "from qdm_cli import __version__",
        "qdm_kernels may not import root",
    ),
    "engine does not print": ("qdm_cli/engine/run.py", "def f():\n    from qdm_cli import report", "run.py:2: run may not import report"),
    "engine does not call the api": ("qdm_cli/engine/run.py", "from qdm_cli import load", "run may not import root (qdm_cli.load)"),
    "siblings know no method": ("qdm_cli/engine/quant/grid.py", "import qdm_cli.engine.methods.lcd", "quant may not import methods"),
    "siblings know no recipe": ("qdm_cli/engine/quant/grid.py", "from qdm_cli.engine.recipe import Recipe", "quant may not import recipe"),
    "methods know no stage": ("qdm_cli/engine/methods/lcd.py", "from ..stages import cache", "methods may not import stages"),
    "stages know no run": ("qdm_cli/engine/stages/cache.py", "from qdm_cli.engine.run import execute", "stages may not import run"),
    "free modules stay free": ("qdm_cli/engine/artifact.py", "from qdm_cli.engine.quant import pack", "free may not import quant"),
    "training scripts are programs": (
        "qdm_cli/engine/models/load.py",
        "from ..zoo.train_unet import build",
        "models may not import zoo script",
    ),
    "methods are strangers": ("qdm_cli/engine/methods/lcd.py", "from .peqa import scale", "lcd.py:1: methods do not import each other"),
    "stages are strangers": ("qdm_cli/engine/stages/cache.py", "import qdm_cli.engine.stages.export", "stages do not import each other"),
    "typer at the terminal": ("qdm_cli/engine/run.py", "import typer", "typer only in"),
    "rich at the terminal": ("qdm_cli/engine/quant/grid.py", "from rich.table import Table", "rich only in"),
    "omegaconf in recipe": ("qdm_cli/commands/ls.py", "from omegaconf import OmegaConf", "omegaconf only in"),
    "ruamel in recipe": ("qdm_cli/commands/ls.py", "import ruamel.yaml", "ruamel only in"),
    "diffusers by models": ("qdm_cli/engine/caching/plan.py", "def f():\n    import diffusers", "plan.py:2: diffusers only in"),
    "triton in triton.py": ("kernels/qdm_kernels/linear_w8a8/op.py", "import triton.language as tl", "triton only in"),
    "triton in kernels": ("qdm_cli/engine/runtime/triton.py", "import triton", "triton only in"),
    "click is vendored": ("qdm_cli/main.py", "import click", "click is never imported"),
    "sdnq is not ours": (
        "qdm_cli/engine/runtime/load.py",
        'import importlib\nimportlib.import_module("sdnq.loader")',
        "load.py:2: sdnq is never",
    ),
    "no pickle": ("qdm_cli/engine/artifact.py", "from pickle import dumps", "pickle is never imported"),
    "no torch.load": ("qdm_cli/engine/models/load.py", "import torch as t\nt.load('x')", "load.py:2: torch.load pickles"),
    "no torch.save": ("qdm_cli/engine/models/load.py", "from torch import save", "torch.save pickles"),
    "no pickled arrays": ("qdm_cli/engine/models/load.py", "import numpy\nnumpy.load('x', allow_pickle=True)", "allow_pickle"),
    "everything has a place": ("qdm_cli/engine/utils.py", "", "has no place"),
}


@pytest.mark.parametrize(("path", "source", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_is_found(tmp_path: Path, path: str, source: str, message: str) -> None:
    others = {
        f"qdm_cli/engine/{name}/__init__.py": "" for name in ("methods", "stages", "recipe", "quant", "models", "zoo", "caching", "runtime")
    } | {f"qdm_cli/engine/{name}.py": "" for name in ("zoo/train_unet", "methods/peqa", "stages/export", "errors")}
    root = plant(
        tmp_path, others | {"qdm_cli/__init__.py": "", "qdm_cli/report.py": "", "qdm_cli/engine/__init__.py": "", path: source + "\n"}
    )
    found = violations(root)
    assert len(found) == 1, found
    assert message in found[0]


def test_a_planted_cycle_is_found(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "qdm_cli/engine/quant/pack.py": "from qdm_cli.engine.runtime import modules",
            "qdm_cli/engine/runtime/modules.py": "def f():\n    from qdm_cli.engine.models import load",
            "qdm_cli/engine/models/load.py": "from ..quant import pack",
        },
    )
    (found,) = violations(root)
    assert "cycle models -> quant -> runtime -> models" in found
    assert "qdm_cli/engine/runtime/modules.py:2" in found


def test_what_is_right_passes(tmp_path: Path) -> None:
    root = plant(
        tmp_path,
        {
            "qdm_cli/__init__.py": "def load():\n    from qdm_cli.engine.runtime import load",
            "qdm_cli/__main__.py": "from qdm_cli.main import main",
            "qdm_cli/main.py": "import typer\nfrom qdm_cli.commands import ls",
            "qdm_cli/commands/ls.py": "import typer\nfrom qdm_cli import __version__, report\nfrom qdm_cli.engine.run import execute",
            "qdm_cli/report.py": "import rich",
            "qdm_cli/engine/run.py": "from . import stages\nfrom qdm_cli.engine.artifact import Artifact",
            "qdm_cli/engine/artifact.py": "from qdm_cli import __version__",
            "qdm_cli/engine/stages/__init__.py": "from .calibrate import calibrate",
            "qdm_cli/engine/stages/calibrate.py": "from ..methods import peqa\nfrom ._shared import x\nfrom ..recipe import Recipe",
            "qdm_cli/engine/stages/_shared.py": "",
            "qdm_cli/engine/methods/peqa.py": "from . import method\nfrom ..quant.grid import IntGrid",
            "qdm_cli/engine/methods/__init__.py": "from . import peqa",
            "qdm_cli/engine/recipe/schema.py": "import omegaconf, ruamel.yaml\nfrom qdm_cli.engine.methods import peqa",
            "qdm_cli/engine/quant/grid.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import diffusers\nimport torch",
            "qdm_cli/engine/runtime/load.py": "import diffusers\nimport qdm_kernels.layout\nfrom ..quant import grid",
            "qdm_cli/engine/zoo/train_unet.py": "import diffusers\nfrom ..quant import grid",
            "kernels/qdm_kernels/layout.py": "import torch",
            "kernels/qdm_kernels/linear_w8a8/triton.py": "import triton.language as tl",
        },
    )
    assert violations(root) == []
