"""What is reconstructed together (BRECQ, Li et al., ICLR 2021): residual and transformer blocks, and every other layer by itself.

Found by structure, so that no class name of diffusers is needed: a block is an entry of a module list that holds at least two
Linear or Conv2d layers and no smaller block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.errors import GateFailed


@dataclass(frozen=True)
class Unit:
    """One module whose output is reconstructed.

    Attributes:
        name: module path; of the layer itself when it is a unit by itself.
        layers: quantized layers inside, in module order.
    """

    name: str
    layers: tuple[str, ...]


def find_units(denoiser: nn.Module, quantized: Collection[str]) -> list[Unit]:
    """Units that hold the layers `quantized`, in module order; each layer is in exactly one. Works on the meta device."""
    blocks = _blocks(denoiser)
    units: dict[str, list[str]] = {}
    for layer in (name for name, _ in denoiser.named_modules() if name in set(quantized)):
        owner = next((block for block in blocks if layer.startswith(block + ".")), layer)
        units.setdefault(owner, []).append(layer)
    return [Unit(name, tuple(layers)) for name, layers in units.items()]


def _blocks(denoiser: nn.Module) -> list[str]:
    entries = [
        f"{path}.{index}" if path else index
        for path, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, entry in module.named_children()
        if _layer_count(entry) >= 2
    ]
    return [name for name in entries if not any(other.startswith(name + ".") for other in entries)]


def _layer_count(module: nn.Module) -> int:
    return sum(isinstance(part, nn.Linear | nn.Conv2d) for part in module.modules())


def in_execution_order(denoiser: nn.Module, units: list[Unit], run: Callable[[], Any]) -> list[Unit]:
    """Sort units by the moment that a forward first enters them.

    Args:
        run: one forward of `denoiser`.

    Raises:
        GateFailed: a unit is never entered, so nothing can be measured on it.
    """
    seen: dict[str, None] = {}
    handles = [
        denoiser.get_submodule(unit.name).register_forward_pre_hook(lambda module, args, name=unit.name: seen.setdefault(name))  # type: ignore[misc]
        for unit in units
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    by_name = {unit.name: unit for unit in units}
    if missing := [unit for unit in units if unit.name not in seen]:
        raise GateFailed(
            f"{missing[0].layers[0]} was never reached by the trajectories, so it cannot be reconstructed. Skip it with a rule."
        )
    return [by_name[name] for name in seen]


class _Reached(BaseException):
    """Ends a forward at the unit; not an Exception, so that no model code catches it."""


@contextmanager
def _stopping_at(module: nn.Module, note: Callable[..., None], *, before: bool) -> Iterator[None]:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        note(args, kwargs)
        raise _Reached

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        note(output)
        raise _Reached

    handle = module.register_forward_pre_hook(enter, with_kwargs=True) if before else module.register_forward_hook(leave)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def inputs_of(module: nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of the first call of `module` in a forward, which ends there."""
    found: list[Any] = []
    with _stopping_at(module, lambda *call: found.append(call), before=True):
        _run(run)
    return found[0]  # type: ignore[no-any-return]


@torch.no_grad()
def output_of(module: nn.Module, run: Callable[[], Any]) -> Any:
    """What the first call of `module` in a forward returns; the forward ends there."""
    found: list[Any] = []
    with _stopping_at(module, found.append, before=False):
        _run(run)
    return found[0]


def _run(run: Callable[[], Any]) -> None:
    try:
        run()
    except _Reached:
        return
    raise RuntimeError("the forward did not reach the unit")
