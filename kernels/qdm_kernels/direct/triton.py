"""Launches compiled kernels by the C function in which triton's own launcher ends.

On its way there triton asks the driver about every address, encodes every descriptor anew, and prepares hooks even where there are none:
several times what the launch itself takes. What the C function gets differs from version to version (3.4 to 3.9), so it is not spelt out
here: the second launch of a variant is triton's own, overheard where it calls that function, and from the third on the same is said with
other grids, addresses and numbers. Where anything is not as expected, triton goes on launching.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache
from types import CellType, FunctionType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver

Grid = tuple[int, int, int]
Boxes = Callable[..., tuple[Any, ...]]  # from the tensors of a call to the descriptors that stand for the first of them
Heads = dict[tuple[int, ...], tuple[Any, ...]]  # encoded descriptors, by the addresses that they were made for
_BEFORE = 5  # a C function takes the grid, the stream and the kernel first, in every version
_MOST_HEADS = 64  # addresses remembered per call of a layer: the allocator gives an input few places


class Variant:
    """One compiled form of a kernel: compiled by its first launch, overheard in its second, launched directly from the third on."""

    __slots__ = ("_fn", "_known", "_options", "_route", "_state")

    def __init__(self, fn: Any, options: dict[str, Any]) -> None:
        self._fn, self._options = fn, options
        self._known: Any = None
        self._route: Route | None = None
        self._state = "unheard" if wanted() else "refused"  # then unproven, direct

    def launch(self, grid: Grid, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], boxes: Boxes | None, heads: Heads) -> None:
        """Run it. boxes: None = no descriptors; heads: those that were encoded for this grid and these sizes."""
        route = self._route
        if route is None or self._state != "direct" or watched() or apart(tensors):
            self._by_triton(grid, tensors, rest, boxes, heads)
            return
        values: Sequence[Any] = [None if one is None else one.data_ptr() for one in tensors]
        if boxes is not None:
            values = route.with_heads(values, tensors, rest, boxes, heads)
        route.go(grid, values, rest)

    def _by_triton(self, grid: Grid, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], boxes: Boxes | None, heads: Heads) -> None:
        described = () if boxes is None else boxes(*tensors)
        arguments = (*described, *tensors[len(described) :], *rest)
        if self._known is None:
            self._known = self._fn[grid](*arguments, **self._options, enable_fp_fusion=False)  # None where nothing is compiled
        elif self._state == "unheard" and not watched():
            self._listen(grid, arguments, len(described))
        elif self._state == "unproven" and not watched():
            self._prove(grid, tensors, rest, boxes, heads, arguments)
        else:
            self._known[grid](*arguments)

    def _listen(self, grid: Grid, arguments: tuple[Any, ...], described: int) -> None:
        heard = overheard(self._known, grid, arguments)
        try:
            self._route, self._state = Route(self._known, heard, arguments, described), "unproven"
        except Exception as error:
            self._refuse(error)

    def _prove(
        self, grid: Grid, tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], boxes: Boxes | None, heads: Heads,
        arguments: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self._state = "direct"
        try:
            self.launch(grid, tensors, rest, boxes, heads)
        except Exception as error:
            self._refuse(error)
            self._known[grid](*arguments)

    def _refuse(self, error: Exception) -> None:
        self._state = "refused"
        _say_once(f"{type(error).__name__}: {error}")


class Route:
    """How to reach the C function of a compiled kernel.

    Args:
        heard: what triton's launcher called it with.
        arguments: what that launcher was given, descriptors first.
        described: how many of them are descriptors.

    Raises:
        TypeError, LookupError, AttributeError: what was heard is not understood.
    """

    __slots__ = ("_described", "_expand", "_middle", "_nested", "go")

    def __init__(self, known: Any, heard: tuple[Any, ...], arguments: tuple[Any, ...], described: int) -> None:
        launcher, self._described = known.run.launch, described
        self._nested = _same(heard[-1], arguments)  # 3.9 hands the arguments of a kernel on as one tuple
        first = len(heard) - (1 if self._nested else len(arguments))
        if first < _BEFORE or heard[4] != known.function or not (self._nested or _same(heard[first:], arguments)):
            raise TypeError(f"triton {triton.__version__} calls its C function in an unknown way")
        self._middle = tuple(None if _is_hook(one) else one for one in heard[_BEFORE:first])
        if any(isinstance(one, Tensor) for one in self._middle):
            raise TypeError("the kernel takes memory of its own, allocated for every launch")
        self._expand: Callable[..., Any]
        raw, self._expand = _unwrapped(launcher) if described else (launcher, _unwrapped)
        self.go = _go(raw, known.function, self._middle, self._nested)

    def with_heads(
        self, values: Sequence[Any], tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...], boxes: Boxes, heads: Heads
    ) -> Sequence[Any]:
        """Addresses, the first of them replaced by encoded descriptors: kept for the addresses that they were made for."""
        at = tuple(values[: self._described])
        head = heads.get(at)
        if head is None:
            head = self._encoded((*boxes(*tensors), *tensors[self._described :], *rest))
            if len(heads) >= _MOST_HEADS:
                heads.clear()
            heads[at] = head
        return (*head, *values[self._described :])

    def _encoded(self, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        front = (0,) * _BEFORE + self._middle
        said = self._expand(*front, arguments)[-1] if self._nested else self._expand(*front, *arguments)[len(front) :]
        behind = arguments[self._described :]
        cut = len(said) - len(behind)
        if not _same(said[cut:], behind):
            raise TypeError(f"triton {triton.__version__} encodes descriptors in an unknown way")
        return tuple(said[:cut])


def _go(
    raw: Callable[..., None], kernel: int, middle: tuple[Any, ...], nested: bool
) -> Callable[[Grid, Sequence[Any], tuple[Any, ...]], None]:
    """The call itself, on the current stream."""
    device, stream = driver.active.get_current_device, driver.active.get_current_stream
    if device is torch.cuda.current_device:
        device = torch._C._cuda_getDevice  # the same without asking whether CUDA is initialised

    def one_by_one(grid: Grid, values: Sequence[Any], rest: tuple[Any, ...]) -> None:
        raw(*grid, stream(device()), kernel, *middle, *values, *rest)

    def as_a_tuple(grid: Grid, values: Sequence[Any], rest: tuple[Any, ...]) -> None:
        raw(*grid, stream(device()), kernel, *middle, (*values, *rest))

    return as_a_tuple if nested else one_by_one


def overheard(known: Any, grid: Grid, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Launch a compiled kernel as triton does; returns what its C function, or the wrapper that encodes descriptors, was called with."""
    launcher, heard = known.run, []
    original = getattr(launcher, "launch", None)
    if original is None:
        known[grid](*arguments)
        return (None,)

    def listening(*said: Any) -> Any:
        heard.append(said)
        return original(*said)

    launcher.launch = listening
    try:
        known[grid](*arguments)
    finally:
        launcher.launch = original
    return heard[0] if heard else (None,)


def _unwrapped(wrapper: Any) -> tuple[Callable[..., None], Callable[..., Any]]:
    """(the C function, the wrapper around a function that returns its arguments)."""
    names = wrapper.__code__.co_freevars
    cells = dict(zip(names, wrapper.__closure__, strict=True))
    raw = cells.pop("launcher").cell_contents
    closure = tuple(cells.get(name) or CellType(lambda *said: said) for name in names)
    return raw, FunctionType(wrapper.__code__, wrapper.__globals__, closure=closure)


def _same(some: Any, others: Sequence[Any]) -> bool:
    """Are these the very same objects?"""
    return isinstance(some, tuple | list) and len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _is_hook(one: Any) -> bool:
    """Is it a hook that nobody waits for, or what is prepared for one?"""
    hooks = (triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook)
    return any(one is hook for hook in hooks) or type(one).__name__ == "LazyDict"


def apart(tensors: tuple[Tensor | None, ...]) -> bool:
    """Is one of them on another device than the first? Triton says so, an address does not."""
    home = tensors[0].get_device() if tensors and tensors[0] is not None else None
    return any([one.get_device() != home for one in tensors if one is not None])  # noqa: C419  a list takes half the time


def watched() -> bool:
    """Does anyone, such as a profiler, wait for launches? Then triton launches, and tells them."""
    runtime = triton.knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return not ((enter is None or getattr(enter, "calls", 0) == []) and (leave is None or getattr(leave, "calls", 0) == []))


@cache
def wanted() -> bool:
    """QDM_DIRECT=0, read once, leaves every launch to triton."""
    return os.environ.get("QDM_DIRECT") != "0" and hasattr(triton, "knobs")


@cache
def _say_once(why: str) -> None:
    logging.getLogger(__name__).warning("kernels are launched by triton itself, which takes longer: %s", why)
