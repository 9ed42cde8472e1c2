"""Where a sampler is in its trajectory, read from the scheduler of any diffusers pipeline (caching spec 5.1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch

MOST_BRANCHES = 4
"""Denoiser calls between two scheduler steps: guidance has up to three branches; what calls more often is no sampling loop."""


_LINK = "__qdm_link__"


@dataclass(frozen=True, eq=False)
class _Link:
    """One method of a scheduler that a clock has put its own around.

    Attributes:
        clock: the owner.
        inner: the method below.
        before: what the scheduler object itself held under the name; None = nothing, the method is its class's.
    """

    clock: Clock
    inner: Callable[..., Any]
    before: Any


class Clock:
    """Follows one scheduler: `set_timesteps` opens a trajectory, every `step` advances it by one call.

    Neither timestep values nor denoiser calls are counted, so repeated values (Heun, PNDM), warm-up calls, guidance in two calls and
    loops that begin in the middle (image-to-image) are told apart.

    Args:
        on_open: called with the scheduler when a trajectory opens.
    """

    def __init__(self, on_open: Callable[[Any], None]):
        self.scheduler: Any = None
        self._on_open = on_open
        self._links: dict[str, _Link] = {}
        self._close()

    def _close(self) -> None:
        self._calls = 0
        self._start: int | None = None
        self._steps = 0
        self._branch = 0

    def follow(self, scheduler: Any) -> None:
        """Follow `scheduler` from now on, and no other one."""
        if scheduler is self.scheduler:
            return
        self.release()
        self.scheduler = scheduler
        self._link_all()

    def _link_all(self) -> None:
        for name, react in (("set_timesteps", self.open), ("step", self._advance)):
            if name not in self._links or not _reaches(getattr(self.scheduler, name), self._links[name]):
                self._unlink(name)  # what is left of an earlier link would only lie in between
                self._link(name, react)

    def _link(self, name: str, react: Callable[[], None]) -> None:
        inner = getattr(self.scheduler, name)
        link = self._links[name] = _Link(self, inner, vars(self.scheduler).get(name))

        @wraps(inner)  # whoever wraps it again reads its signature
        def method(*args: Any, **kwargs: Any) -> Any:
            result = inner(*args, **kwargs)
            if self._links.get(name) is link:
                react()
            return result

        setattr(method, _LINK, (method, link))
        setattr(self.scheduler, name, method)

    def _unlink(self, name: str) -> None:
        """Take away methods of this clock that lie on top; one that was wrapped again since stays and does nothing more."""
        self._links.pop(name, None)
        while (link := _link_of(vars(self.scheduler).get(name))) is not None and link.clock is self:
            delattr(self.scheduler, name)
            if link.before is not None:
                setattr(self.scheduler, name, link.before)

    def release(self) -> None:
        """Give the scheduler its own methods back; twice = once."""
        for name in list(self._links):
            self._unlink(name)
        self.scheduler = None
        self._close()

    def open(self) -> None:
        """Begin a trajectory over the scheduler's present timesteps.

        Whoever wrapped a method before this clock did, and took the wrapper off again since, took the clock's method off with it.
        """
        self._link_all()
        self._close()
        self._calls = len(self.scheduler.timesteps)
        self._on_open(self.scheduler)

    def _advance(self) -> None:
        self._steps += 1
        self._branch = 0

    def place(self, timestep: Any) -> tuple[int, int] | None:
        """(call, guidance branch) of the denoiser call that is being made; None = it belongs to no trajectory.

        Args:
            timestep: of the call; only its place in memory is read, except at the first call with a scheduler that does not say where
                it begins.
        """
        found = self.next_place(timestep)
        if found is not None:
            self._branch += 1
        return found

    def next_place(self, timestep: Any) -> tuple[int, int] | None:
        """As `place`, of the denoiser call that comes next."""
        if not self._calls:
            return None
        known = place_in_memory(self.scheduler.timesteps, timestep)
        if self._start is None:
            self._start = self._begin(timestep, known)
        call = self._start + self._steps
        if call >= self._calls or self._branch >= MOST_BRANCHES or (known is not None and known != call):
            return None
        return call, self._branch

    def _begin(self, timestep: Any, known: int | None) -> int:
        told = getattr(self.scheduler, "begin_index", None)
        if told is not None:
            return int(told)
        return nearest(self.scheduler, timestep) if known is None else known


def _link_of(method: Any) -> _Link | None:
    """The link that a method was made for; None = it is no clock's. Whoever wraps a function copies its attributes as well."""
    owner, link = getattr(method, _LINK, (None, None))
    return link if owner is method else None


def _reaches(method: Any, link: _Link) -> bool:
    """Whether a method is that of `link`, or a wrapper that says to call it."""
    while method is not None:
        if _link_of(method) is link:
            return True
        method = getattr(method, "__wrapped__", None)
    return False


def place_in_memory(table: torch.Tensor, value: Any) -> int | None:
    """Index of the entry of `table` that `value` is a view of, as it is in the loop `for t in scheduler.timesteps`; None = a copy."""
    if not isinstance(value, torch.Tensor) or not value.numel() or value.device != table.device or value.dtype != table.dtype:
        return None
    if value.untyped_storage().data_ptr() != table.untyped_storage().data_ptr():
        return None
    index = (value.storage_offset() - table.storage_offset()) // max(table.stride(0), 1)
    return index if 0 <= index < len(table) else None


def nearest(scheduler: Any, timestep: Any) -> int:
    """Index of the first scheduler timestep nearest to a value; some models are given t / T instead of t."""
    value = float(torch.as_tensor(timestep).flatten()[0])
    table = scheduler.timesteps.detach().double().cpu()
    if value <= 1 < float(table.max()):
        value *= float(scheduler.config.get("num_train_timesteps", 1000))
    return int((table - value).abs().argmin())
