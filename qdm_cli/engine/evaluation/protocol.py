"""How numbers were obtained, as data, so that unlike ones are not compared. Imports neither torch nor diffusers.

A protocol has a part `common` and one part per suite. Two results are comparable when `common` and every part that both have
are equal; `versions` is information only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from qdm_cli.engine.errors import InputError

INFORMATIVE = "versions"
_LIBRARIES = ("torch", "diffusers", "torchmetrics", "torch-fidelity", "lpips", "scipy", "numpy")

Protocol = dict[str, Any]


def library_versions() -> dict[str, str | None]:
    """Installed versions of what computes the numbers; None = not installed."""
    found: dict[str, str | None] = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hash_texts(texts: Iterable[str] | None) -> str | None:
    """sha256 over prompts in order; None = no prompts."""
    if texts is None:
        return None
    return hashlib.sha256(json.dumps(list(texts)).encode()).hexdigest()


def differences(a: Protocol, b: Protocol) -> list[str]:
    """Dotted fields in which two protocols differ, with both values; empty = comparable."""
    parts = [part for part in a if part in b and part != INFORMATIVE]
    found = []
    for part in parts:
        left, right = _flat(a[part], part), _flat(b[part], part)
        for key in sorted(left.keys() | right.keys()):
            if left.get(key) != right.get(key):
                found.append(f"{key}: {_show(left.get(key))} here, {_show(right.get(key))} there")
    return found


def refuse_unlike(here: Protocol, there: Protocol, name: str | Path) -> None:
    """
    Raises:
        InputError: the protocols differ, or have no suite in common; the message lists every differing field.
    """
    shared = [part for part in here if part in there and part not in (INFORMATIVE, "common")]
    if not shared:
        raise InputError(f"{name} has no suite in common with this evaluation", path="evaluate.against")
    if unlike := differences(here, there):
        raise InputError(f"{name} was measured by another protocol and is not comparable: " + "; ".join(unlike), path="evaluate.against")


def _flat(value: Any, prefix: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return {path: leaf for name, item in value.items() for path, leaf in _flat(item, f"{prefix}.{name}").items()}
    # a protocol read from JSON has lists where a fresh one has tuples
    return {prefix: list(value) if isinstance(value, tuple) else value}


def _show(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:18] + "…" + text[-8:]
