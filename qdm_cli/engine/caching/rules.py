"""Schedules that need no measurement: which calls are computed in full (caching spec 1.2, 1.3). Imports neither torch nor diffusers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

POWER_STEP = 0.02


def uniform(calls: int, interval: int) -> tuple[int, ...]:
    """Every `interval`-th call (DeepCache 3.2, "1:N").

    Raises:
        ValueError: `interval` is not in 1..calls.
    """
    _check(calls, interval)
    return tuple(range(0, calls, interval))


def deepcache(calls: int, interval: int, center: int, power: float) -> tuple[tuple[int, ...], float]:
    """Non-uniform DeepCache as its released Stable Diffusion and DDPM code computes it: denser around `center`.

    The root of the negative end is the principal complex one and only the real part of the powers is kept. Where fewer than
    ceil(calls / interval) distinct calls come out, the power falls by 0.02 until they do.

    Returns:
        (full calls, power that was used).

    Raises:
        ValueError: `interval` or `center` out of range, or no power above 1 gives enough calls.
    """
    _check(calls, interval)
    if not 0 <= center < calls:
        raise ValueError(f"center must lie in 0..{calls - 1} (got {center})")
    count, trial = math.ceil(calls / interval), power
    while trial > 1:
        found = _released(calls, count, center, trial)
        if len(found) == count:
            return found, trial
        trial -= POWER_STEP
    raise ValueError(f"no power in (1, {power:g}] gives {count} different full calls of {calls} around {center}; choose a larger power")


def _released(calls: int, count: int, center: int, power: float) -> tuple[int, ...]:
    low = np.complex128(-center) ** (1 / power) if center else np.complex128(0)
    high = np.complex128(calls - center) ** (1 / power)
    line = low + (high - low) * np.arange(count + 1) / count
    # complex powers, not polar form: a last-bit difference below an integer changes the truncated value
    values = np.unique(np.trunc((line**power).real).astype(np.int64))
    return (0, *(int(value) + center for value in values[1:-1]))


def deepcache_paper(calls: int, interval: int, center: int, power: float) -> tuple[int, ...]:
    """Eq. 7 of the DeepCache paper as written, with signed real roots; no repair where calls coincide.

    Its spacing collapses to one or two calls around `center`, which the released code does not do: see `deepcache`.

    Raises:
        ValueError: `interval` or `center` out of range, power not positive.
    """
    _check(calls, interval)
    if not 0 <= center < calls or power <= 0:
        raise ValueError(f"center must lie in 0..{calls - 1} and power above 0 (got {center}, {power:g})")
    count = math.ceil(calls / interval)
    low, high = -(center ** (1 / power)), (calls - center) ** (1 / power)
    line = low + (high - low) * np.arange(count) / count
    values = np.sign(line) * np.abs(line) ** power
    values[0] = -center  # the root's rounding must not move the first call off 0
    return tuple(int(value) + center for value in np.unique(np.trunc(values)))


def deepcache_ldm(calls: int, interval: int, power: float = 1.5) -> tuple[int, ...]:
    """Non-uniform DeepCache of the released latent-diffusion code: dense early, sparse late.

    It may return fewer than ceil(calls / interval) calls: coinciding ones are not replaced.

    Raises:
        ValueError: `interval` out of range, power not positive.
    """
    _check(calls, interval)
    if power <= 0:
        raise ValueError(f"power must be above 0 (got {power:g})")
    count = math.ceil(calls / interval)
    line = np.linspace(0, calls ** (1 / power), count + 1)
    values = np.unique(np.trunc(line**power).astype(np.int64))[:-1]
    return tuple(int(value) for value in values)


def from_mask(mask: Sequence[int] | str) -> tuple[int, ...]:
    """Full calls of a mask, 1 = compute, 0 = reuse: `[1, 0, 0, 1]`, `"1001"` or `"1,0,0,1"`, as cache-dit writes them.

    Raises:
        ValueError: another value than 0 and 1, empty, or it does not start with 1.
    """
    entries = [entry for entry in mask if entry not in ", "] if isinstance(mask, str) else list(mask)
    if not entries or any(str(entry) not in ("0", "1") for entry in entries):
        raise ValueError("a mask holds 1 (compute) and 0 (reuse) alone, one per step")
    full = tuple(index for index, entry in enumerate(entries) if str(entry) == "1")
    if not full or full[0] != 0:
        raise ValueError("the first entry of a mask must be 1: nothing has been computed that could be reused")
    return full


def to_calls(steps: Sequence[int], step_of_call: Sequence[int]) -> tuple[int, ...]:
    """Full steps -> full calls: the first call of each, so a second-order solver refreshes once per step."""
    first = {step: call for call, step in reversed(list(enumerate(step_of_call)))}
    return tuple(first[step] for step in steps)


def _check(calls: int, interval: int) -> None:
    if not 1 <= interval <= calls:
        raise ValueError(f"interval must lie in 1..{calls}, the number of steps (got {interval})")
