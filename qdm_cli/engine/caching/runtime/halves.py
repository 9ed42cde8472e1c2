"""What a cache calls in place of the denoiser: the whole of it, and of every cut the full and the partial forward (caching spec 6)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from qdm_cli.engine.caching.runtime.shadow import shadow
from qdm_cli.engine.caching.runtime.split import SplitDenoiser
from qdm_cli.engine.caching.schedule import Cut

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Lent:
    """A tensor that the next run of the same function may overwrite: whoever keeps it copies it."""

    value: torch.Tensor


class Runner(Protocol):
    """Runs pure functions of a denoiser, as CUDA graphs do."""

    def run(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`function(*args, **kwargs)`: tensors of the result belong to the caller, those in `Lent` excepted."""

    def drop(self, functions: Iterable[Function]) -> None:
        """These will not be run again."""


class Halves:
    """Functions of one denoiser, cut anew when its layers are replaced, as adapters do.

    Run here they are bare forwards, since hooks of the model have run by then. A runner is given them with the hooks, and answers calls of
    the model itself, hooks and all: the row of step tables that a hook finds is part of what a graph computes.

    Args:
        cuts: all that may be asked for.
        compiled: options of `torch.compile` for each forward; None = not compiled.
    """

    def __init__(self, cuts: Iterable[Cut], compiled: Mapping[str, Any] | None):
        self._cuts, self._compiled = tuple(cuts), None if compiled is None else dict(compiled)
        self.runner: Runner | None = None
        self.splits: dict[str, SplitDenoiser] = {}
        self._functions: dict[tuple[str, str], Function] = {}
        self._denoiser: nn.Module | None = None
        self._structure: tuple[int, ...] = ()

    @property
    def compiled(self) -> bool:
        return self._compiled is not None

    @property
    def fixed(self) -> bool:
        """Whether kept tensors must stay at one place in memory: a full forward may overwrite what it gave before."""
        return self.compiled or self.runner is not None

    def cut(self, denoiser: nn.Module) -> None:
        """Make the functions, unless those of the very same layers are there.

        Raises:
            InputError: the model lacks a cut.
        """
        structure = tuple(map(id, denoiser.modules()))
        if structure != self._structure:
            self.forget()
            self.splits = {cut.id: SplitDenoiser(denoiser, cut) for cut in self._cuts}
            self._denoiser, self._structure = denoiser, structure

    def forget(self) -> None:
        """Drop all functions, and what a runner holds for them."""
        if self.runner is not None:
            self.runner.drop(self._functions.values())
        self.splits, self._functions, self._denoiser, self._structure = {}, {}, None, ()

    def run_by(self, runner: Runner | None) -> None:
        """Who runs the functions from now on; None = they run as they are."""
        if self.runner is not None:
            self.runner.drop(self._functions.values())
        self.runner, self._functions = runner, {}

    def whole(self, original: Function, call: Arguments) -> Any:
        """The denoiser's answer. original: its forward."""
        if self.runner is None:
            return original(*call[0], **call[1])
        return self.runner.run(self._function("", "whole", lambda: _whole(self._denoiser)), *call)

    def full(self, cut: str, call: Arguments) -> tuple[Any, torch.Tensor]:
        """(the denoiser's answer, the cut's tensor, to be copied if `fixed`)."""
        split = self.splits[cut]
        if self.runner is None:
            return split.run_full(self._function(cut, "full", lambda: self._bare(split.full_model)), *call)
        output, lent = self.runner.run(self._function(cut, "full", lambda: _full(split)), *call)
        return output, lent.value

    def partial(self, cut: str, feature: torch.Tensor, call: Arguments) -> Any:
        """The denoiser's answer if the cut's tensor were `feature`."""
        split = self.splits[cut]
        args, kwargs = call[0], split.partial_arguments(call[1])
        if self.runner is None:
            return split.run_partial(self._function(cut, "partial", lambda: self._bare(split.partial_model)), feature, args, kwargs)
        return self.runner.run(self._function(cut, "partial", lambda: _partial(split)), (feature, *args), kwargs)

    def _function(self, cut: str, kind: str, make: Callable[[], Function]) -> Function:
        if (cut, kind) not in self._functions:
            self._functions[cut, kind] = make()
        return self._functions[cut, kind]

    def _bare(self, model: nn.Module) -> Function:
        return model.forward if self._compiled is None else torch.compile(model.forward, **self._compiled)


def _whole(denoiser: nn.Module | None) -> Function:
    """The model without the forward that a cache put into it."""
    assert denoiser is not None
    return shadow(denoiser)._call_impl


def _full(split: SplitDenoiser) -> Function:
    def full(*args: Any, **kwargs: Any) -> tuple[Any, Lent]:
        output, feature = split.run_full(split.full_model._call_impl, args, kwargs)
        return output, Lent(feature)

    return full


def _partial(split: SplitDenoiser) -> Function:
    def partial(feature: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return split.run_partial(split.partial_model._call_impl, feature, args, kwargs)

    return partial
