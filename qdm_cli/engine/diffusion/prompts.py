"""Prompts of text pipelines: the captions that ship with qdm, or a file of the user."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path

from qdm_cli.engine.errors import InputError

CAPTIONS = "builtin:captions-128"
_KEYS = ("prompt", "caption", "text")


def prompts_for(source: str, count: int | None = None) -> list[str]:
    """`count` prompts from `source`, repeated from the start when there are fewer; None = all of them.

    Args:
        source: `builtin:captions-128`; or a file: .txt (one per line), .tsv with a header or .jsonl (key prompt, caption or text).

    Raises:
        InputError: no such source, or no prompt in it.
    """
    if source == CAPTIONS:
        text = (resources.files("qdm_cli.engine.models") / "data" / "captions-128.txt").read_text(encoding="utf-8")
        found = text.splitlines()
    elif source.startswith("builtin:"):
        raise InputError(f"prompts: there is no {source}. Did you mean '{CAPTIONS}'?")
    else:
        found = _read(Path(source).expanduser())
    found = [line.strip() for line in found if line.strip()]
    if not found:
        raise InputError(f"prompts: {source} holds no prompt.")
    return found if count is None else [found[index % len(found)] for index in range(count)]


def _read(path: Path) -> list[str]:
    readers: dict[str, Callable[[str], list[str]]] = {".txt": str.splitlines, ".tsv": _from_tsv, ".jsonl": _from_jsonl}
    if path.suffix not in readers:
        raise InputError(f"prompts: {path} is no .txt, .tsv or .jsonl file.")
    try:
        return readers[path.suffix](path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prompts: {path} cannot be read: {error}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"prompts: {path} is malformed or has no column or key prompt, caption or text: {error}.") from error


def _from_tsv(text: str) -> list[str]:
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    return [_pick(row) for row in rows]


def _from_jsonl(text: str) -> list[str]:
    return [_pick(json.loads(line)) for line in text.splitlines() if line.strip()]


def _pick(row: dict[str, str]) -> str:
    return str(row[next((key for key in _KEYS if key in row), _KEYS[0])])
