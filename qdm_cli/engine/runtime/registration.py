"""Makes stock diffusers read `quant_method: qdm`, without importing torch or diffusers now (interface specification 8.4).

diffusers has no call for third-party quantizers: its two dicts in `diffusers.quantizers.auto` are filled when that module is imported,
or at once when it is there already.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TARGET = "diffusers.quantizers.auto"
PLUGIN = "qdm_cli.engine.runtime.plugin"

_problem: str | None = None


class _Finder:
    """Waits on `sys.meta_path` for the import of `TARGET`, lets the other finders find it, and fills its dicts after its code ran."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = _spec_of_others(fullname, path, target)
        if spec is None or spec.loader is None:
            sys.meta_path.insert(0, self)
            return spec
        spec.loader.exec_module = self._then_fill(spec.loader.exec_module)  # type: ignore[method-assign,assignment]
        return spec

    def _then_fill(self, run: Callable[[ModuleType], Any]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            try:
                run(module)
            except BaseException:
                sys.meta_path.insert(0, self)  # the next attempt to import it needs us again
                raise
            _fill()

        return exec_module


def _spec_of_others(fullname: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
    for finder in list(sys.meta_path):
        find = getattr(finder, "find_spec", None)
        spec = find(fullname, path, target) if find is not None else None
        if spec is not None:
            return spec
    return None


def _fill() -> None:
    """Import the plug-in, whose last lines fill the dicts. It may be half-imported (it pulled diffusers in): nothing is read from it.

    A failure is kept for `registration_status`, not raised: it must not break `import diffusers` for code that never opens a qdm folder.
    """
    global _problem
    _problem = None
    try:
        importlib.import_module(PLUGIN)
    except Exception as error:
        _problem = f"{type(error).__name__}: {error}"
        import warnings

        warnings.warn(f"qdm could not register with diffusers: {_problem}", stacklevel=2)


def register() -> None:
    """Register qdm's quantizer with diffusers, now or when diffusers is imported. Calling it again changes nothing."""
    if _registered():
        return
    if TARGET in sys.modules:
        _fill()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def registration_status() -> dict[str, str | None]:
    """State of the registration: {"state": registered | waiting | failed | off, "why": text or None}. Imports nothing."""
    if _registered():
        return {"state": "registered", "why": None}
    if _problem is not None:
        return {"state": "failed", "why": _problem}
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return {"state": "waiting", "why": "diffusers is not imported yet"}
    return {"state": "off", "why": "qdm_cli.register() was not called"}


def _registered() -> bool:
    return "qdm" in getattr(sys.modules.get(TARGET), "AUTO_QUANTIZER_MAPPING", {})
