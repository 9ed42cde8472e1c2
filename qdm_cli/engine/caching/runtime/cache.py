"""Runs a pipeline along a cache schedule: a context manager, or switched on and off (caching spec 5)."""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.runtime.clock import Clock
from qdm_cli.engine.caching.runtime.control import Control, ControlReuse
from qdm_cli.engine.caching.runtime.follow import Itineraries, Itinerary, Source
from qdm_cli.engine.caching.runtime.halves import Arguments, Halves, Runner
from qdm_cli.engine.caching.runtime.kept import Call, Kept, Store
from qdm_cli.engine.caching.runtime.split import SplitDenoiser
from qdm_cli.engine.caching.schedule import Action
from qdm_cli.engine.errors import InputError

_OURS = "__qdm_cache__"
_PLACES = ("_old_forward", "forward")
"""Where a module's forward can be replaced: under the offload hook of accelerate, which moves weights first, or plainly."""


class Cache:
    """Answers a denoiser's calls in full or from the kept tensor. All state is here: neither model nor pipeline is changed for good.

    Whatever does not fit at run time (other shape, type, device or prompt than when the tensor was kept) is computed in full, said
    once, and counted in `summary()`.

    Args:
        pipeline: a diffusers pipeline with a scheduler; it may be given another scheduler at any time.
        component: name of its denoiser.
        source: what each call does.
        corrections: `scale.<cut>` and `shift.<cut>`, [calls, channels] f32, as `schedule.json` describes them; empty = none.
        force: cache samplers of 8 or fewer steps as well.
        controlnet: reuse = a ControlNet of the pipeline is computed where the denoiser is, and its residuals are kept with the tensor.
        compiled: options of `torch.compile` for the full and the partial forward, one graph each; None = not compiled.
    """

    def __init__(
        self,
        pipeline: Any,
        component: str,
        source: Source,
        *,
        corrections: Mapping[str, torch.Tensor] | None = None,
        force: bool = False,
        controlnet: Control = "recompute",
        compiled: Mapping[str, Any] | None = None,
    ):
        self.pipeline, self.component, self.source = pipeline, component, source
        self._itineraries = Itineraries(source, force=force)
        self._clock = Clock(self._opened)
        self._corrections = dict(corrections or {})
        self._halves = Halves(source.cuts, compiled)
        self._patched: nn.Module | None = None
        self._control = ControlReuse(self._source_of) if controlnet == "reuse" else None
        self.forward: Any = None
        self._was_enabled: list[bool] = []
        self._stores: dict[tuple[int, bool], Store] = {}
        self._kept: dict[int, Kept] = {}
        self._itinerary: Itinerary | None = None
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self.taken: list[tuple[int, int, str]] = []
        """(call, guidance branch, full | partial) of the present trajectory."""
        signature = inspect.signature(type(self.denoiser).forward).parameters
        self._timestep_at = list(signature).index("timestep") - 1

    @property
    def denoiser(self) -> nn.Module:
        """The model whose calls are answered."""
        found: nn.Module = getattr(self.pipeline, self.component)
        return found

    @property
    def compiled(self) -> bool:
        """Whether its functions are compiled by torch."""
        return self._halves.compiled

    @property
    def runner(self) -> Runner | None:
        """Who runs its functions; None = it does."""
        return self._halves.runner

    @property
    def _splits(self) -> dict[str, SplitDenoiser]:
        return self._halves.splits

    # ------------------------------------------------------------ switching on and off

    def enable(self) -> Cache:
        """Answer the denoiser's calls from now on; enabling twice is enabling once.

        Raises:
            InputError: the denoiser runs along another schedule, its forward was replaced or compiled, or it lacks a cut.
        """
        if self._patched is not None:
            return self
        denoiser = self.denoiser
        place, before = _patchable(denoiser, compiled=self.compiled)
        self._halves.cut(denoiser)

        @wraps(before)  # its signature is read: the step context looks for `timestep`
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._answer(before, args, kwargs) if self._patched is denoiser else before(*args, **kwargs)

        setattr(forward, _OURS, self)
        setattr(denoiser, place, forward)
        self._patched, self.forward = denoiser, forward
        self._clock.follow(self.pipeline.scheduler)
        if self._control is not None:
            self._control.attach(getattr(self.pipeline, "controlnet", None))
        return self

    def disable(self) -> None:
        """Give the model its own forward back and drop everything kept; disabling twice is disabling once."""
        denoiser, self._patched = self._patched, None
        if denoiser is None:
            return
        for place in _PLACES:
            if cache_of(vars(denoiser).get(place)) is self:
                if place == "forward":
                    del denoiser.forward
                else:
                    denoiser._old_forward = type(denoiser).forward.__get__(denoiser)
        if self._control is not None:
            self._control.detach()
        self._clock.release()
        self._forget()
        self._halves.forget()
        self.run_by(None)

    def run_by(self, runner: Runner | None) -> None:
        """Let CUDA graphs, say, run the functions from now on, and give calls of the model to `answer`; None = no longer."""
        self._halves.run_by(runner)
        self._kept.clear()
        self._stores.clear()

    def answer(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands for a whole call of the denoiser, hooks and all, once somebody runs its functions."""
        assert self.runner is not None
        return self._answer(self.denoiser.forward, args, kwargs)

    def __enter__(self) -> Cache:
        self._was_enabled.append(self._patched is not None)
        return self.enable()

    def __exit__(self, *problem: object) -> None:
        if not self._was_enabled.pop():
            self.disable()

    def full_share(self) -> float | None:
        """Share of the present trajectory's calls that were computed in full; None = it has had none."""
        return sum(kind == "full" for *_, kind in self.taken) / len(self.taken) if self.taken else None

    def summary(self) -> dict[str, Any]:
        """What has happened so far.

        full, partial: denoiser calls by kind; outside: calls that belong to no trajectory; fell_open: by reason, partial calls that were
        computed in full; trajectories; tensors, bytes: kept at present.
        """
        return {
            **{name: self._counts[name] for name in ("trajectories", "full", "partial", "outside")},
            "fell_open": dict(self._reasons),
            "tensors": sum(len(kept.stores) for kept in self._kept.values()),
            "bytes": sum(store.nbytes for kept in self._kept.values() for store in kept.stores),
        }

    # ------------------------------------------------------------ one trajectory

    def _opened(self, scheduler: Any) -> None:
        """A trajectory begins: nothing of the one before may be reused."""
        self._forget()
        self._itinerary = None  # of() may raise
        self._itinerary = self._itineraries.of(scheduler)
        self._counts["trajectories"] += 1
        if self._patched is not None:
            self._halves.cut(self._patched)

    def _forget(self) -> None:
        self._kept.clear()
        if self._control is not None:
            self._control.forget()
        self.taken.clear()

    def _answer(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands for the denoiser's forward."""
        self._follow()
        place = self._clock.place(kwargs["timestep"] if "timestep" in kwargs else args[self._timestep_at])
        if place is None or self._itinerary is None:
            self._counts["outside" if place is None else "full"] += 1
            return self._halves.whole(original, (args, kwargs))
        call, branch = place
        action = self._itinerary.actions[call]
        try:
            given = Call.of(args, kwargs)
            if action.action == "partial":
                why = self._why_not(action, branch, given, kwargs)
                if why is None:
                    return self._partial(action, branch, (args, kwargs))
                self._fall_open(why)
            return self._full(original, action, branch, given, (args, kwargs))
        except BaseException:
            self._kept.clear()  # a call that did not end may have left half a tensor
            raise

    def _follow(self) -> None:
        if self._clock.scheduler is not self.pipeline.scheduler:  # the pipeline was given another one, its timesteps are set by now
            self._clock.follow(self.pipeline.scheduler)
            if getattr(self.pipeline.scheduler, "num_inference_steps", 1):  # None = it was never given timesteps
                self._clock.open()

    def _source_of(self, timestep: Any) -> tuple[int, int | None, int] | None:
        """What `ControlReuse` asks for."""
        self._follow()
        place = self._clock.next_place(timestep)
        if place is None or self._itinerary is None:
            return None
        call, branch = place
        action, kept = self._itinerary.actions[call], self._kept.get(branch)
        reusable = action.action == "partial" and kept is not None and kept.cut == action.cut
        return branch, kept.source if reusable and kept is not None else None, call

    def _why_not(self, action: Action, branch: int, given: Call, kwargs: dict[str, Any]) -> str | None:
        """Why a partial call must be computed in full; None = it can be partial; "" = it is the first call of its trajectory."""
        kept = self._kept.get(branch)
        if kept is None or kept.cut != action.cut or kept.source < int(action.source or 0):
            first = all(other != branch for _, other, _ in self.taken)
            return "" if first else "nothing is kept that it could reuse"
        return kept.call.change_to(given) or self._splits[kept.cut].why_not_partial(kwargs)

    def _fall_open(self, why: str) -> None:
        if not why:
            return
        if why not in self._reasons:
            warnings.warn(f"cache: a call is computed in full: {why}", stacklevel=4)
        self._reasons[why] += 1

    def _full(self, original: Callable[..., Any], action: Action, branch: int, given: Call, call: Arguments) -> Any:
        self._note(action, branch, "full")
        before = self._kept.pop(branch, None)
        if action.cut is None:  # nothing reuses it
            return self._halves.whole(original, call)
        output, feature = self._halves.full(action.cut, call)
        linear = self._itinerary is not None and self._itinerary.linear
        place = (branch, bool(linear and before is not None and before.place == (branch, False)))
        int8 = self._splits[action.cut].cut.store_dtype == "int8"
        store = self._stores.setdefault(place, Store(int8=int8, fixed=self._halves.fixed))
        store.put(feature)
        usable = linear and before is not None and before.cut == action.cut and before.call.change_to(given) is None
        self._kept[branch] = Kept(store, action.cut, action.call, given, place, replace(before, before=None) if before and usable else None)
        return output

    def _partial(self, action: Action, branch: int, call: Arguments) -> Any:
        self._note(action, branch, "partial")
        feature = self._corrected(action, self._kept[branch].at(action.call if action.order else None))
        return self._halves.partial(str(action.cut), feature, call)

    def _note(self, action: Action, branch: int, kind: str) -> None:
        self._counts[kind] += 1
        self.taken.append((action.call, branch, kind))

    def _corrected(self, action: Action, feature: torch.Tensor) -> torch.Tensor:
        """scale * feature + shift of this call, where the schedule has them for this grid."""
        scale = self._corrections.get(f"scale.{action.cut}")
        if scale is None or self._itinerary is None or not self._itinerary.as_made:
            return feature
        if scale.device != feature.device:
            self._corrections = {name: table.to(feature.device) for name, table in self._corrections.items()}
            scale = self._corrections[f"scale.{action.cut}"]
        shape = (-1, 1, 1) if self._splits[str(action.cut)].cut.kind == "unet_up" else (-1,)
        rows = (table[action.call].to(feature.dtype).view(shape) for table in (self._corrections[f"shift.{action.cut}"], scale))
        shift, factor = rows
        return torch.addcmul(shift, feature, factor)


def cache_of(forward: Any) -> Cache | None:
    """The cache that answers for a forward; None = none does."""
    found = getattr(forward, _OURS, None)
    # whoever wraps a function copies its attributes as well
    return found if isinstance(found, Cache) and found.forward is forward else None


def active_cache(denoiser: nn.Module) -> Cache | None:
    """The cache that is switched on for a model; None = none is."""
    return next((found for place in _PLACES if (found := cache_of(vars(denoiser).get(place))) is not None), None)


def _patchable(denoiser: nn.Module, *, compiled: bool) -> tuple[str, Callable[..., Any]]:
    """(attribute to replace, function that it holds now).

    Raises:
        InputError: somebody else's function is there.
    """
    name = type(denoiser).__name__
    if active_cache(denoiser) is not None:
        raise InputError(f"this {name} runs along a cache schedule already; disable that one first, or use it: qdm_cli.cached(pipeline)")
    outer = getattr(denoiser, "_compiled_call_impl", None)
    if compiled and getattr(outer, "follows_caches", False):
        raise InputError(f"this {name} is replayed from CUDA graphs: its halves cannot be compiled as well, give cached() without compile")
    if outer is not None and not getattr(outer, "follows_caches", False):
        raise InputError(f"this {name} is compiled as a whole, which hides the cut; give the plain model and cached(..., compile=True)")
    if "_old_forward" in vars(denoiser):
        return "_old_forward", denoiser._old_forward
    # accelerate leaves the class's own forward behind on the object
    if getattr(vars(denoiser).get("forward", denoiser.forward), "__func__", None) is not type(denoiser).forward:
        raise InputError(f"the forward of this {name} was replaced by something else (another cache?); undo that first")
    return "forward", denoiser.forward
