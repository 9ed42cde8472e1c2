"""A file, a bundled name or stdin -> one frozen recipe.

The order: `extends`, the file, overrides, interpolation, schema, cross-field rules.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from pydantic import ValidationError

from qdm_cli.engine.errors import InputError, Problem, RecipeError
from qdm_cli.engine.recipe.bundled import bundled_names, bundled_text
from qdm_cli.engine.recipe.checks import cross_checks, empty_stages
from qdm_cli.engine.recipe.errors import Finding, booleans_for_numbers, findings_of, refuse
from qdm_cli.engine.recipe.fields import EXTENDS
from qdm_cli.engine.recipe.overrides import apply_overrides
from qdm_cli.engine.recipe.schema import Recipe
from qdm_cli.engine.recipe.source import Document, Origin, Path_, leaves, parse_document, parse_value
from qdm_cli.engine.recipe.suggest import closest

INTERPOLATION = re.compile(r"\$\{(?:env:(?P<env>[A-Za-z_][A-Za-z0-9_]*)|(?P<key>[A-Za-z_]\w*(?:\.\w+)*))\}")


ENV = "environment"


@dataclass(frozen=True)
class LoadedRecipe:
    """A valid recipe and where it came from.

    Attributes:
        recipe: complete and frozen; its `name` is set.
        name: of the run folder: the recipe's `name`, else the file's stem.
        text: the source, as written (before `extends` and overrides).
        file: how the source is called in messages: a path, `NAME.yaml` of a bundled recipe, or `<stdin>`.
        origins: where each value was written.
    """

    recipe: Recipe
    name: str
    text: str
    file: str
    origins: dict[Path_, Origin]

    def where(self, path: str) -> str | None:
        """`file:line:column` of a dotted path, or of the nearest section around it."""
        keys: Path_ = tuple(int(key) if key.isdecimal() else key for key in path.split("."))
        while keys and keys not in self.origins:
            keys = keys[:-1]
        return str(self.origins[keys]) if keys else None

    def placed(self, error: InputError) -> RecipeError:
        """An error about this recipe that was found later, with the positions of the settings that it names."""
        return RecipeError([self._placed(problem) for problem in error.problems])

    def _placed(self, problem: Problem) -> Problem:
        """Messages of the engine start with the setting; here it has a column of its own."""
        named, _, rest = problem.message.partition(": ")
        message = rest if problem.path and rest and problem.path.startswith(named) else problem.message
        where = problem.where or (self.where(problem.path) if problem.path else None) or self.file
        return Problem(message, where, problem.path, problem.hint)


def load_recipe(source: str | Path, overrides: Sequence[str] = (), *, stdin: TextIO | None = None) -> LoadedRecipe:
    """Load and check one recipe.

    Args:
        source: a path (ends in .yaml or .yml, or holds a separator and exists), a bundled name such as `unet/w4a8`, or `-`.
        overrides: `KEY=VALUE`, `KEY+=VALUE`, `~KEY`, applied in order.
        stdin: read for `-`; None = the process's.

    Raises:
        RecipeError: everything that is wrong in the recipe, with positions.
        InputError: the source cannot be found, is ambiguous, or stdin is empty or a terminal.
    """
    text, file, stem = read_source(source, stdin=stdin)
    document, problems = merged_document(text, file, overrides)
    document, interpolation = _interpolate(document)
    findings = [*empty_stages(text, document), *interpolation, *booleans_for_numbers(document.data)]
    document.data.setdefault("name", None)
    if document.data["name"] is None:
        document.data["name"] = _run_name(stem)
    recipe = None
    try:
        recipe = Recipe.model_validate(document.data)
        findings += cross_checks(recipe)
    except ValidationError as error:
        seen = {finding.path for finding in findings}
        findings += [finding for finding in findings_of(error, document.data) if finding.path not in seen]
    if findings or problems or recipe is None:
        raise refuse(findings, document.origins, tuple(overrides), problems)
    return LoadedRecipe(recipe, str(recipe.name), text, file, document.origins)


def read_source(source: str | Path, *, stdin: TextIO | None = None) -> tuple[str, str, str]:
    """Text, name in messages, and stem of a recipe.

    Raises:
        InputError: not found, not readable, ambiguous, or stdin has nothing.
    """
    name = str(source)
    if name == "-":
        return _read_stdin(stdin or sys.stdin), "<stdin>", "stdin"
    if name.endswith((".yaml", ".yml")) or isinstance(source, Path):
        return _read_file(Path(name)), name, Path(name).stem
    names, is_file = bundled_names(), Path(name).is_file()
    if name in names and is_file:
        raise InputError(f"'{name}' is a bundled recipe and also a file here. Write ./{name} for the file, or rename it.")
    if name in names:
        return bundled_text(name), f"{name}.yaml", name.rsplit("/", 1)[-1]
    if is_file and ("/" in name or os.sep in name):
        return _read_file(Path(name)), name, Path(name).stem
    hint = closest(name, names)
    meant = f" Did you mean '{hint}'?" if hint else ""
    raise InputError(f"there is no recipe '{name}'.{meant} `qdm ls` lists the bundled ones; a file ends in .yaml", hint=hint)


def _read_stdin(stream: TextIO | None) -> str:
    if stream is None or stream.closed:
        raise InputError("the recipe is to come from stdin, but stdin is closed")
    if stream.isatty():
        raise InputError("the recipe is to come from stdin, but stdin is a terminal. Pipe a file into it, or name one.")
    text = stream.read()
    if not text.strip():
        raise InputError("the recipe is to come from stdin, but it is empty: the previous step produced nothing")
    return text


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        near = closest(path.name, [item.name for item in path.parent.glob("*.y*ml")]) if path.parent.is_dir() else None
        raise InputError(f"there is no file {path}" + (f". Did you mean '{path.parent / near}'?" if near else ""), hint=near) from None
    except IsADirectoryError:
        raise InputError(f"{path} is a folder, not a recipe") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text (byte {error.start})") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def merged_document(text: str, file: str, overrides: Sequence[str] = ()) -> tuple[Document, list[Problem]]:
    """`extends`, then the file, then overrides; plain data, not yet interpolated or checked.

    Raises:
        RecipeError: the file or one that it extends is not YAML, or `extends` is wrong.
    """
    own = parse_document(text, file)
    bases = [_base(name, own, index, layer) for layer, (index, name) in enumerate(_extends(own))]
    document = parse_document(text, file, layer=len(bases))
    document.data.pop(EXTENDS, None)
    for base in reversed(bases):
        document = _merge(base, document)
    return apply_overrides(document, overrides, layer=len(bases) + 1)


def _extends(document: Document) -> list[tuple[Path_, str]]:
    """Path of each entry in the document and its text."""
    value = document.data.get(EXTENDS, [])
    if isinstance(value, str):
        return [((EXTENDS,), value)]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise refuse([Finding((EXTENDS,), "must be a list of bundled names or files")], document.origins)
    return [((EXTENDS, index), item) for index, item in enumerate(value)]


def _base(name: str, own: Document, path: Path_, layer: int) -> Document:
    """One extended recipe. Files are looked for beside the recipe that names them."""
    folder = Path(own.origins[()].file or "").parent
    beside = folder / name
    try:
        text, file, _ = read_source(beside if name.endswith((".yaml", ".yml")) else name)
    except InputError as error:
        raise refuse([Finding(path, str(error), error.problems[0].hint)], own.origins) from None
    base = parse_document(text, file, layer=layer)
    if EXTENDS in base.data:
        raise refuse([Finding(path, f"{name} extends another recipe itself; one level is allowed")], own.origins)
    base.data.pop("name", None)  # a run folder belongs to one recipe
    return base


def _merge(under: Document, over: Document) -> Document:
    """Deep merge of mappings; lists and values are replaced. Interpolations stay as they are."""
    from omegaconf import OmegaConf

    for layer in (under, over):
        _refuse_other_interpolation(layer)
    merged = OmegaConf.to_container(OmegaConf.merge(OmegaConf.create(under.data), OmegaConf.create(over.data)))
    assert isinstance(merged, dict)
    return Document({str(key): value for key, value in merged.items()}, under.origins | over.origins)


def _wrong_interpolation(document: Document) -> list[Finding]:
    wrong = [path for path, value in leaves(document.data) if isinstance(value, str) and "${" in INTERPOLATION.sub("", value)]
    return [Finding(path, "only ${env:NAME} and ${section.setting} can be filled in") for path in wrong]


def _refuse_other_interpolation(document: Document) -> None:
    findings = _wrong_interpolation(document)
    if findings:
        raise refuse(findings, document.origins)


def _interpolate(document: Document) -> tuple[Document, list[Finding]]:
    """Fill in `${env:X}` and `${a.b}`; a value that is nothing but one of them takes its type."""
    findings = _wrong_interpolation(document)
    wrong = {finding.path for finding in findings}
    texts = {path: value for path, value in leaves(document.data) if isinstance(value, str) and "${" in value}
    wanted = {path: value for path, value in texts.items() if path not in wrong}
    if not wanted:
        return document, findings
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # OmegaConf's resolvers are global to the process; a section of the scratch copy is not
    scratch = deepcopy(document.data)
    for path in wrong:
        _set_(scratch, path, None)
    scratch[ENV] = {name: parse_value(os.environ[name], Origin(0, f"${name}", 1, 1), ())[0] for name in _environment(wanted.values())}
    for path, value in wanted.items():
        _set_(scratch, path, INTERPOLATION.sub(lambda match: f"${{{ENV}.{match['env']}}}" if match["env"] else match[0], value))
    config, data = OmegaConf.create(scratch), deepcopy(document.data)
    for path, value in wanted.items():
        try:
            node: Any = config
            for key in path:
                node = node[key]
            _set_(data, path, OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node)
        except OmegaConfBaseException as error:
            findings.append(Finding(path, _why(error, value)))
    return Document(data, document.origins), findings


def _environment(texts: Iterable[str]) -> set[str]:
    """Names of the variables that are asked for and set."""
    asked = {match["env"] for text in texts for match in INTERPOLATION.finditer(text) if match["env"]}
    return {name for name in asked if name in os.environ}


def _why(error: Exception, value: str) -> str:
    missing = [match["env"] for match in INTERPOLATION.finditer(value) if match["env"] and match["env"] not in os.environ]
    if missing:
        return f"the environment variable {missing[0]} is not set"
    if "Recursive" in str(error):
        return f"{value} leads back to itself"
    return f"{value} names no setting that is written in this recipe"


def _set_(data: Any, path: Path_, value: Any) -> None:
    for key in path[:-1]:
        data = data[key]
    data[path[-1]] = value


def _run_name(stem: str) -> str:
    """A file's stem as a folder name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "recipe"
