"""What a misspelt setting may mean."""

from __future__ import annotations

import difflib

from qdm_cli.engine.recipe.fields import EXTENDS, catalogue, known, owner_of
from qdm_cli.engine.recipe.source import Path_, dotted
from qdm_cli.engine.spec import Spec


def closest(word: str, names: list[str]) -> str | None:
    """The name that a misspelt word most likely means; None = nothing is near.

    One slip of the fingers counts before difflib's ratio, which fails short names: `ix` and `id` share half their letters.
    """
    slips = [name for name in names if one_slip(word, name)]
    if slips:
        return max(slips, key=lambda name: difflib.SequenceMatcher(None, word, name).ratio())
    near = difflib.get_close_matches(word, names, n=1, cutoff=0.6)
    return near[0] if near else None


def one_slip(a: str, b: str) -> bool:
    """One letter missing, added or wrong, or two neighbours swapped; letter case does not count."""
    a, b = a.lower(), b.lower()
    if a == b:
        return True
    if abs(len(a) - len(b)) > 1:
        return False
    start = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    rest_a, rest_b = a[start:], b[start:]
    if len(a) != len(b):
        return (rest_a[1:] if len(a) > len(b) else rest_a) == (rest_b[1:] if len(b) > len(a) else rest_b)
    return rest_a[1:] == rest_b[1:] or (rest_a[:2] == rest_b[:2][::-1] and rest_a[2:] == rest_b[2:])


def suggest(word: str, siblings: list[str], near: str = "") -> str | None:
    """What an unknown setting may mean: a sibling's name, else the dotted path of a setting elsewhere.

    Args:
        near: dotted path of the section it stands in; of several settings with one name the nearest is taken.
    """
    sibling = closest(word, siblings)
    if sibling:
        return sibling
    name = closest(word, sorted({item.name for item in catalogue()}))
    return nearest_path(name, near) if name else None


def nearest_path(name: str, near: str = "") -> str | None:
    """Dotted path of the setting with this name that shares the longest way with `near`, then the shortest."""
    paths = list(dict.fromkeys(item.path for item in catalogue() if item.name == name))
    if not paths:
        return None

    def shared(path: str) -> int:
        pairs = zip(path.split("."), near.split("."), strict=False)
        return next((index for index, (a, b) in enumerate(pairs) if a != b), min(path.count("."), near.count(".") + 1))

    return min(paths, key=lambda path: (-shared(path), path.count("."), paths.index(path)))


def suggest_option(option: str) -> str | None:
    """`--steps` or `steps` -> `sampler.steps`, for a setting that was given as an option; None = no setting has such a name."""
    word = option.lstrip("-").replace("-", "_").split("=")[0]
    if any(item.path == word for item in catalogue()):
        return word
    name = closest(word, sorted({item.name for item in catalogue()}))
    return nearest_path(name) if name else None


def unknown_setting(path: Path_, model: type[Spec] | None = None) -> tuple[str, str | None]:
    """Message and hint for a path that the schema does not have.

    Args:
        model: the section that it stands in; None = found from the path.
    """
    shape = known(path[:-1]).shape
    models = [model] if model else list(shape.sections.values()) if shape else []
    siblings = [name for section in models for name in section.model_fields] + ([EXTENDS] if len(path) == 1 else [])
    other = _owners(path)
    if other and model:
        return f"is a setting of method {' and '.join(other)}, not of {owner_of(model)}", None
    hint = suggest(str(path[-1]), siblings, dotted(path[:-1]))
    return "unknown setting" + (f". Did you mean '{hint}'?" if hint else ""), hint


def _owners(path: Path_) -> list[str]:
    """Methods that have a setting of exactly this path."""
    text = ".".join("N" if isinstance(key, int) else str(key) for key in path)
    return [item.owner for item in catalogue() if item.path == text and item.owner]
