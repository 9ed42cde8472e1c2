"""Linear extrapolation of the kept tensor, where measured to help (caching spec 3.4).

Extrapolation multiplies the noise that quantization puts into each kept tensor by sqrt((1 + r)^2 + r^2), r = calls since the full call per
calls between the last two. Whether the drift that it takes away is worth that is measured on the deployed model, noise included.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from qdm_cli.engine.caching.drive import Features, Loop, Taps, relative_error
from qdm_cli.engine.caching.schedule import Action, Schedule


def with_orders(schedule: Schedule, errors: dict[int, tuple[float, float]]) -> Schedule:
    """The schedule with order 1 at the calls whose extrapolated prediction is nearer to the reference than the reused one."""
    actions = list(schedule.actions)
    for call, (plain, line) in errors.items():
        pair = _pair(schedule, actions[call])
        if line < plain and pair is not None:
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
    cuts = list(schedule.cuts)
    own, other = Taps(loop.loaded.denoiser, cuts), None if reference is None else Taps(reference, [])
    sums: dict[int, torch.Tensor] = {}
    for start, count in starts:
        kept: dict[tuple[int, int], Features] = {}

        def answer(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            output, features = own.full(args, kwargs)
            action = schedule.actions[call]
            if action.action == "full":
                kept[call, branch] = features  # noqa: B023
            elif (pair := _pair(schedule, action)) is not None:
                truth = loop.noise(output if other is None else other.full(args, kwargs)[0], count)  # noqa: B023
                last, before = (kept[place, branch][str(action.cut)] for place in pair)  # noqa: B023
                line = torch.lerp(before, last, 1 + (call - pair[0]) / (pair[0] - pair[1]))
                found = [loop.noise(own.partial(str(action.cut), value, args, kwargs), count) for value in (last, line)]  # noqa: B023
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
