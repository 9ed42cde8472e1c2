"""The recipes that ship with qdm: package data `qdm_cli.recipes`, found by recursion."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from importlib.abc import Traversable

HEADER = re.compile(r"#\s?(?:(?P<key>run|override|family|method|bits|gpu|size|quality):\s*)?(?P<text>.*)")


@dataclass(frozen=True)
class Bundled:
    """One bundled recipe, as its comment header describes it; empty = the header does not say.

    Attributes:
        name: as on the command line, such as `unet/w4a8`.
        what: first line of the header.
        run, override: commands to copy.
        family, method, bits, gpu, size, quality: columns of `qdm ls`.
    """

    name: str
    what: str = ""
    run: str = ""
    override: str = ""
    family: str = ""
    method: str = ""
    bits: str = ""
    gpu: str = ""
    size: str = ""
    quality: str = ""


def _entries() -> Iterator[tuple[str, Traversable]]:
    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
        for item in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if item.is_dir():
                yield from walk(item, f"{prefix}{item.name}/")
            elif item.name.endswith(".yaml"):
                yield prefix + item.name[: -len(".yaml")], item

    yield from walk(files("qdm_cli.recipes"), "")


def bundled_names() -> list[str]:
    """Names of all bundled recipes."""
    return [name for name, _ in _entries()]


def bundled_text(name: str) -> str:
    """The YAML of one bundled recipe.

    Raises:
        KeyError: there is none of this name.
    """
    return dict(_entries())[name].read_text(encoding="utf-8")


def bundled() -> list[Bundled]:
    """All bundled recipes with their headers."""
    return [parse_header(name, item.read_text(encoding="utf-8")) for name, item in _entries()]


def parse_header(name: str, text: str) -> Bundled:
    """Read the comment lines at the top of a recipe."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        match = HEADER.fullmatch(line.rstrip())
        if match is None:
            break
        key = match["key"] or "what"
        if match["text"] and not match["text"].startswith("yaml-language-server"):
            found.setdefault(key, match["text"])
    return Bundled(name, **found)
