"""Measured drift of features and predictions between denoising steps, streamed from trajectories of the model that will run.

The deployed (quantized) model follows its own trajectory; at every call the full-precision model sees the same x_t. An error against its
prediction holds quantization and reuse together, and exceeds the sum of both where they amplify each other (caching spec 3, 4.2).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qdm_cli.engine.caching.drive import Loop, Taps, relative_error
from qdm_cli.engine.caching.runtime.kept import line
from qdm_cli.engine.caching.schedule import Cut, SamplerRef
from qdm_cli.engine.checkpoint import read_tensors, write_tensors

PROFILE_FILE = "profile.safetensors"


@dataclass
class Profile:
    """Sums over trajectories; `mean` turns them into averages.

    Attributes:
        feature: [B, n, W] relative L2 error of the tensor of call i against the reference's tensor of call i + r; of the extrapolated
            tensor where its prediction is nearer.
        output: [B, n, W] relative L2 error of the prediction of call i + r when it reuses cut b of call i, against the reference's.
            r = 0 is the error of a full call: the quantization error. NaN where not measured.
        count: trajectories in it.
    """

    feature: np.ndarray
    output: np.ndarray
    count: int = 0

    @classmethod
    def empty(cls, cuts: int, calls: int, window: int) -> Profile:
        return cls(np.full((cuts, calls, window), np.nan), np.full((cuts, calls, window), np.nan))

    def add(self, table: np.ndarray, place: tuple[int, int, int], value: float, samples: float) -> None:
        """Count one measurement of `samples` trajectories; the branches of sequential guidance are half of one each."""
        table[place] = np.nan_to_num(table[place]) + value * samples

    def mean(self) -> Profile:
        """Averages instead of sums."""
        return Profile(self.feature / self.count, self.output / self.count, 1)

    def __add__(self, other: Profile) -> Profile:
        return Profile(self.feature + other.feature, self.output + other.output, self.count + other.count)

    def write(self, path: Path) -> None:
        tensors = {field.name: torch.as_tensor(getattr(self, field.name)) for field in fields(self)}
        write_tensors(path, tensors)

    @classmethod
    def read(cls, path: Path) -> Profile:
        tensors, _ = read_tensors(path)
        return cls(tensors["feature"].numpy(), tensors["output"].numpy(), int(tensors["count"]))


class DriftRun:
    """Answers the denoiser's calls of one trajectory and measures on the way; keeps the last W tensors of each cut.

    Args:
        reference: full-precision denoiser with the same cuts; None = the deployed model is its own reference.
        lags: largest lag at which predictions of partial calls are measured.
        line: partial calls may extrapolate from two full calls: the nearer prediction counts.
    """

    def __init__(self, loop: Loop, own: Taps, reference: Taps | None, profile: Profile, samples: int, lags: int, *, line: bool = False):
        self.loop, self.own, self.reference = loop, own, reference
        self.profile, self.samples, self.lags, self.line = profile, samples, lags, line
        self.window = profile.feature.shape[2]
        self.rings: dict[tuple[int, str], deque[torch.Tensor]] = {}

    def __call__(self, call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        output, features = self.own.full(args, kwargs)
        true_output, true_features = (output, features) if self.reference is None else self.reference.full(args, kwargs)
        truth = self.loop.noise(true_output, self.samples)
        own = relative_error(self.loop.noise(output, self.samples), truth)

        def prediction_error(name: str, tensor: torch.Tensor, lag: int) -> float:
            if lag == 0 or lag > self.lags:
                return math.inf if lag else own
            return relative_error(self.loop.noise(self.own.partial(name, tensor, args, kwargs), self.samples), truth)

        for index, (name, feature) in enumerate(features.items()):
            ring = self.rings.setdefault((branch, name), deque(maxlen=2 * self.window if self.line else self.window))
            ring.appendleft(feature.detach())
            for lag in range(min(len(ring), self.window)):
                measured = [(prediction_error(name, tensor, lag), tensor) for tensor in self._reusable(ring, lag)]
                found = min((error, relative_error(tensor, true_features[name])) for error, tensor in measured)
                self._note((index, call - lag, lag), *found)
        return output

    def _reusable(self, ring: Sequence[torch.Tensor], lag: int) -> list[torch.Tensor]:
        """What a call may reuse `lag` calls after the latest full one: its tensor, or the line through it and the one before.

        Where that one will be is not known yet: as far back as a segment that ends here would begin, or at call 0.
        """
        before = min(2 * lag + 1, len(ring) - 1)
        if not self.line or lag == 0 or before == lag:
            return [ring[lag]]
        return [ring[lag], line(ring[before], ring[lag], lag / (before - lag))]

    def _note(self, place: tuple[int, int, int], prediction: float, feature: float) -> None:
        share = self.samples / self.loop.passes
        self.profile.add(self.profile.feature, place, feature, share)
        if math.isfinite(prediction):
            self.profile.add(self.profile.output, place, prediction, share)


def drift(
    loop: Loop,
    reference: nn.Module | None,
    cuts: list[Cut],
    sampler: SamplerRef,
    *,
    window: int,
    lags: int,
    line: bool = False,
    starts: list[tuple[int, int]],
    resume: Path,
    progress: Callable[[int, int], None],
) -> Profile:
    """Profile of the deployed model.

    Args:
        reference: full-precision denoiser; None = the deployed model is full precision itself.
        window: W, the longest segment.
        lags: largest lag at which predictions of partial calls are measured; 0 = none.
        line: partial calls may extrapolate linearly.
        starts: (first sample, samples) of each batch of trajectories.
        resume: folder of finished batches, which are not run again.
    """
    own = Taps(loop.loaded.denoiser, cuts)
    other = None if reference is None else Taps(reference, cuts)
    parts: list[Profile] = []
    for number, (start, count) in enumerate(starts):
        path = resume / f"drift-{number:04d}.safetensors"
        if not path.exists():
            part = Profile.empty(len(cuts), sampler.calls, window)
            loop.run(start, count, DriftRun(loop, own, other, part, count, lags, line=line))
            part.count = count
            part.write(path)
        parts.append(Profile.read(path))
        progress(number + 1, len(starts))
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total.mean()


def predicted_errors(profile: Profile) -> np.ndarray:
    """[B, n, W] error of the prediction at every lag: as measured, else the feature's error times the gain seen at lag 1.

    Gain = error of the prediction per error of the reused tensor. It differs from cut to cut, so features alone could not be compared.
    """
    _, calls, window = profile.output.shape
    table = profile.output.copy()
    for lag in range(2, window):
        for call in range(lag, calls):
            start, before = call - lag, call - 1
            missing = np.isnan(table[:, start, lag])
            gain = profile.output[:, before, 1] / np.maximum(profile.feature[:, before, 1], 1e-12)
            table[:, start, lag] = np.where(missing, gain * profile.feature[:, start, lag], table[:, start, lag])
    return table


def added_errors(table: np.ndarray) -> np.ndarray:
    """[B, n, W] what reuse adds to the error of a full call at the same step, at least 0; r = 0 is 0. Of squares: give it squares."""
    cuts, calls, window = table.shape
    full = np.concatenate([table[:, :, 0], np.full((cuts, window), np.nan)], axis=1)
    reach = np.arange(calls)[:, None] + np.arange(window)
    return np.maximum(table - full[:, reach], 0.0)


def analytic_weights(sampler: SamplerRef, *, flow: bool) -> np.ndarray:
    """[n] effect of an error of each prediction on the last latent, without the network's reaction (caching spec 4.3).

    DDIM and Euler: x / sqrt(abar) advances by (s_(t+1) - s_t) eps with s = sqrt((1 - abar) / abar); flow matching: x by the change of
    sigma.
    A step of several calls shares its weight. Sums to 1.
    """
    half = np.asarray(sampler.log_snr) / 2
    level = 1 / (1 + np.exp(half)) if flow else np.exp(-half)
    steps = np.asarray(sampler.step_of_call)
    first = np.array([level[steps == step][0] for step in range(steps[-1] + 1)] + [0.0])
    moved = np.abs(np.diff(first))
    share = moved[steps] / np.bincount(steps)[steps]
    return share / share.sum()


class Replay:
    """One trajectory with a single partial call: calls before it are answered from the record, later ones are computed."""

    def __init__(self, loop: Loop, own: Taps, cut: str, at: int, record: dict[tuple[int, int], Any], samples: int):
        self.loop, self.own, self.cut, self.at, self.record, self.samples = loop, own, cut, at, record, samples
        self.kept: dict[int, torch.Tensor] = {}
        self.local: list[float] = []

    def __call__(self, call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if call < self.at - 1:
            return self.record[call, branch]
        if call != self.at:
            output, features = self.own.full(args, kwargs)
            self.kept[branch] = features[self.cut]
            return output
        output = self.own.partial(self.cut, self.kept[branch], args, kwargs)
        truth = self.loop.noise(self.record[call, branch], self.samples)
        self.local.append(relative_error(self.loop.noise(output, self.samples), truth))
        return output


def rollout_weights(
    loop: Loop, cut: Cut, calls: int, *, points: int, start: int, samples: int, progress: Callable[[int, int], None]
) -> np.ndarray:
    """[n] error of the last latent per error of one prediction, measured by one reuse at a call, continued to the end.

    Measured at `points` calls, interpolated geometrically between them; about points * n / 2 denoiser calls.
    """
    own = Taps(loop.loaded.denoiser, [cut])
    record: dict[tuple[int, int], Any] = {}

    def recorded(call: int, branch: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        record[call, branch] = own.full(args, kwargs)[0]
        return record[call, branch]

    truth = loop.run(start, samples, recorded)
    places = np.unique(np.round(np.linspace(1, calls - 1, min(points, calls - 1))).astype(int))
    found = []
    for number, place in enumerate(places):
        replay = Replay(loop, own, cut.id, int(place), record, samples)
        error = relative_error(loop.run(start, samples, replay), truth)
        found.append(error / max(float(np.mean(replay.local)), 1e-9))
        progress(number + 1, len(places))
    return np.exp(np.interp(np.arange(calls), places, np.log(np.maximum(found, 1e-9))))
