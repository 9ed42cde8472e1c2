"""Linear extrapolation of the kept tensor, where measured to help (caching spec 3.4).

Extrapolation multiplies the noise that quantization puts into each kept tensor by sqrt((1 + r)^2 + r^2), r = calls since the full call per
calls between the last two. Whether the drift that it takes away is worth that is measured on the deployed model, noise included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.drive import Features, Loop, Taps, relative_error
from qdm_cli.engine.caching.runtime.kept import line
from qdm_cli.engine.caching.schedule import Action, Schedule


@dataclass(frozen=True)
class Read:
    """What a partial call reuses.

    Attributes:
        cut: id. call: its own place.
        sources: full calls whose tensors it reads, the latest first: one, or two for an extrapolation.
    """

    cut: str
    call: int
    sources: tuple[int, ...]

    def reused(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The tensor of the latest full call, or the line through both at this call. tensors: of `sources`."""
        if len(tensors) == 1:
            return tensors[0]
        latest, before = self.sources
        return line(tensors[1], tensors[0], (self.call - latest) / (latest - before))


def reads_of(schedule: Schedule) -> dict[int, Read]:
    """Partial call -> what it reads."""
    found = {}
    for action in schedule.actions:
        if action.action == "partial":
            full = [call for call in schedule.refreshes if call <= int(action.source or 0)]
            found[action.call] = Read(str(action.cut), action.call, tuple(full[: -2 - action.order : -1]))
    return found


def last_reader(reads: Mapping[int, Read]) -> dict[int, tuple[int, str]]:
    """Full call -> (last call that reads its tensor, cut)."""
    return {source: (call, read.cut) for call, read in sorted(reads.items()) for source in read.sources}


def linear(schedule: Schedule) -> Schedule:
    """The schedule with order 1 at every call that has two full calls of its cut in a row before it."""
    return with_orders(schedule, dict.fromkeys(range(schedule.sampler.calls), (1.0, 0.0)))


def with_orders(schedule: Schedule, errors: Mapping[int, tuple[float, float]]) -> Schedule:
    """The schedule with order 1 at the calls whose extrapolated prediction is nearer to the reference than the reused one, 0 at others.

    Args:
        errors: call -> (error of plain reuse, extrapolated).
    """
    actions = [action.model_copy(update={"order": 0}) for action in schedule.actions]
    for call, (plain, extrapolated) in errors.items():
        pair = _pair(schedule, actions[call])
        if extrapolated < plain and pair is not None:
            actions[call] = actions[call].model_copy(update={"order": 1})
            # a full call that nothing reused plainly is kept all the same
            actions[pair[1]] = actions[pair[1]].model_copy(update={"cut": actions[call].cut})
    return Schedule.model_validate(schedule.model_copy(update={"actions": tuple(actions)}).model_dump())


def extrapolation_errors(
    loop: Loop, reference: nn.Module | None, schedule: Schedule, starts: list[tuple[int, int]]
) -> dict[int, tuple[float, float]]:
    """Partial call -> relative L2 errors of the prediction (plain reuse, extrapolated), mean over trajectories.

    Calls are left out that have no two full calls of their cut in a row before them.

    Args:
        reference: full-precision denoiser on the same inputs; None = the deployed model itself.
        starts: (first sample, samples) of each batch of trajectories.
    """
    cuts, reads = list(schedule.cuts), {call: read for call, read in reads_of(linear(schedule)).items() if len(read.sources) > 1}
    own, other = Taps(loop.loaded.denoiser, cuts), None if reference is None else Taps(reference, [])
    sums: dict[int, torch.Tensor] = {}
    for start, count in starts:
        kept: dict[tuple[int, int], Features] = {}

        def answer(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output, features = own.full(args, kwargs)
            if schedule.actions[call].action == "full":
                kept[call, branch] = features  # noqa: B023
            elif (read := reads.get(call)) is not None:
                truth = loop.noise(output if other is None else other.full(args, kwargs)[0], count)  # noqa: B023
                tensors = [kept[source, branch][read.cut] for source in read.sources]  # noqa: B023
                found = [loop.noise(own.partial(read.cut, value, args, kwargs), count) for value in (tensors[0], read.reused(tensors))]  # noqa: B023
                errors = count * torch.tensor([relative_error(value, truth) for value in found])  # noqa: B023
                sums[call] = sums.get(call, torch.zeros(2)) + errors
            return output

        loop.run(start, count, answer)
    total = sum(count for _, count in starts) * loop.passes
    return {call: (float(errors[0]) / total, float(errors[1]) / total) for call, errors in sums.items()}


def _pair(schedule: Schedule, action: Action) -> tuple[int, int] | None:
    """The full call that a partial one reuses and the one before, where that keeps the same cut or none."""
    earlier = [call for call in schedule.refreshes if call < int(action.source or 0)]
    if not earlier or schedule.actions[earlier[-1]].cut not in (action.cut, None):
        return None
    return int(action.source or 0), earlier[-1]
