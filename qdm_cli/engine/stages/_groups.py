"""Where `calibrate.timestep_groups` puts the bounds of the intervals."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qdm_cli.engine.diffusion.intervals import clustered_keys, uniform_keys, unvisited
from qdm_cli.engine.diffusion.noising import NoiseSchedule, training_schedule
from qdm_cli.engine.diffusion.trajectories import TrajectoryStore, sample_tensor
from qdm_cli.engine.errors import InputError
from qdm_cli.engine.quant.calibration import calls_at, run_denoiser

if TYPE_CHECKING:
    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.diffusion.interval_config import IntervalSpec
    from qdm_cli.engine.models import LoadedPipeline

PATH = "calibrate.timestep_groups"


def group_keys(spec: IntervalSpec, loaded: LoadedPipeline, store: TrajectoryStore, ctx: RunContext) -> Tensor:
    """f64 [k], smallest timestep of each group; images are those that the captured trajectories end in.

    Raises:
        InputError: more groups than steps, or than the grid of times holds.
    """
    steps = store.timesteps()
    if spec.k > len(steps):
        raise InputError(f"{PATH}.k: {spec.k} groups, but the sampler has {len(steps)} steps", path=f"{PATH}.k")
    schedule = training_schedule(loaded.pipeline.scheduler, unit_time=max(steps) <= 1)
    keys = uniform_keys(spec.k, schedule.end)
    if spec.method != "uniform":
        ends = Ends(loaded.denoiser, store, schedule, spec.samples)
        keys = clustered_keys(spec, schedule, ends.x0(), ends.predict if spec.method == "model_x0" else None, ctx.recipe.seed)
    if missed := unvisited(keys, steps):
        ctx.warn(f"{PATH}: the sampler of {len(steps)} steps never visits {', '.join(missed)}; such a group takes its nearest step's range")
    ctx.events.log(f"{PATH}: groups start at timesteps {', '.join(f'{float(key):g}' for key in keys)}")
    return keys


class Ends:
    """The denoiser at the last step of captured trajectories, whose x_0 estimate is the image, and with other inputs in its place.

    Args:
        samples: inputs in all.
    """

    def __init__(self, denoiser: Any, store: TrajectoryStore, schedule: NoiseSchedule, samples: int):
        self.denoiser, self.schedule = denoiser, schedule
        last = min(store.timesteps())
        self.calls = list(calls_at(store, last, samples))
        self.index = int((schedule.times.double() - last).abs().argmin())

    def x0(self) -> Tensor:
        """f32 [M, ...]."""
        x_t = torch.cat([sample_tensor(call).float().cpu() for call in self.calls])
        return self._estimate(x_t, torch.full((len(x_t),), self.index), replaced=False)

    def predict(self, x_t: Tensor, index: Tensor) -> Tensor:
        """x_0 that the denoiser predicts at x_t, with the conditions of the captured calls in order."""
        return self._estimate(x_t, index, replaced=True)

    def _estimate(self, x_t: Tensor, index: Tensor, *, replaced: bool) -> Tensor:
        found, start = [], 0
        for call in self.calls:
            part = slice(start, start + len(sample_tensor(call)))
            start = part.stop
            own = dict(call)
            if replaced:
                name = next(key for key in ("sample", "hidden_states") if key in own)
                own |= {name: x_t[part].to(sample_tensor(call)), "timestep": self.schedule.times[index[part]]}
            predicted = run_denoiser(self.denoiser, own).float().cpu()
            predicted = predicted[:, : x_t.shape[1]] if x_t.ndim == 4 else predicted
            found.append(self.schedule.estimate(x_t[part], predicted, index[part]))
        return torch.cat(found)
