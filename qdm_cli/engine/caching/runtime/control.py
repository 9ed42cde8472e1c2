"""ControlNet under a cache: computed at every call, or only where the denoiser is (caching spec 5.7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal

from torch import nn

from qdm_cli.engine.caching.runtime.kept import Call, same

Control = Literal["recompute", "reuse"]
CONDITIONS = ("controlnet_cond", "conditioning_scale", "guess_mode", "return_dict", "control_type", "control_mode")
"""What a ControlNet is given beside the arguments of a denoiser: none may change under kept residuals."""


@dataclass(frozen=True)
class _Residuals:
    """What a ControlNet answered since the denoiser's full call `source`, and what it was given."""

    source: int
    call: Call
    conditions: tuple[Any, ...]
    answer: Any


class ControlReuse:
    """Answers a ControlNet's calls: before a partial call of the denoiser with the residuals of the full call that it reuses.

    Whatever does not fit (other shape, picture, prompt or strength) is computed.

    Args:
        source_of: timestep of a call -> (guidance branch, call whose residuals may be reused, call that is being made) of the denoiser
            call that follows; the second is None where it is computed in full, and the whole is None outside of a trajectory.
    """

    def __init__(self, source_of: Callable[[Any], tuple[int, int | None, int] | None]):
        self._source_of = source_of
        self._kept: dict[int, _Residuals] = {}
        self._module: nn.Module | None = None
        self._forward: Any = None
        self._before: Any = None

    def attach(self, module: Any) -> None:
        """Answer the calls of a ControlNet from now on; None = the pipeline has none."""
        if not isinstance(module, nn.Module):
            return
        original, before = module.forward, vars(module).get("forward")

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._answer(original, args, kwargs) if self._module is module else original(*args, **kwargs)

        module.forward = forward
        self._module, self._forward, self._before = module, forward, before

    def detach(self) -> None:
        """Give the ControlNet its own forward back; one that was wrapped again since stays and does nothing more."""
        module, self._module = self._module, None
        if module is not None and vars(module).get("forward") is self._forward:
            del module.forward
            if self._before is not None:
                module.forward = self._before

    def forget(self) -> None:
        """A trajectory begins or ends."""
        self._kept.clear()

    def _answer(self, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands for the ControlNet's forward."""
        found = self._source_of(kwargs["timestep"] if "timestep" in kwargs else args[1])
        if found is None:
            return original(*args, **kwargs)
        branch, source, call = found
        given, conditions = Call.of(args, kwargs), tuple(kwargs.get(name) for name in CONDITIONS)
        kept = self._kept.get(branch)
        if kept is not None and kept.source == source and kept.call.change_to(given) is None and same(kept.conditions, conditions):
            return kept.answer
        answer = original(*args, **kwargs)
        self._kept[branch] = _Residuals(call if source is None else source, given, conditions, answer)
        return answer
