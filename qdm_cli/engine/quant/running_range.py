"""Activation ranges as moving averages of smallest and largest value (Q-Diffusion, quantization spec 1.2 `running`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qdm_cli.engine.diffusion.trajectories import timestep_of
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import run_denoiser, watched_inputs
from qdm_cli.engine.quant.grid import IntGrid, QParams, qparams_from_range

if TYPE_CHECKING:
    from qdm_cli.engine.quant.reconstruction import Pair
    from qdm_cli.engine.quant.state import LayerDecision

MOMENTUM = 0.95


class Averages:
    """Low and high ends per layer and row; a row starts with its first values, not at zero."""

    def __init__(self) -> None:
        self.ends: dict[tuple[str, int], torch.Tensor] = {}

    def update(self, name: str, row: int, x: torch.Tensor) -> None:
        """Take the extremes of one call.

        Raises:
            GateFailed: they are NaN or infinite.
        """
        new = torch.stack([x.amin(), x.amax()]).float().cpu()
        if not bool(torch.isfinite(new).all()):
            raise GateFailed(f"The input of {name} holds NaN or infinity; its range cannot be measured.")
        old = self.ends.get((name, row))
        self.ends[name, row] = new if old is None else MOMENTUM * old + (1 - MOMENTUM) * new

    def params(self, name: str, rows: int, grid: IntGrid, *, symmetric: bool) -> QParams:
        """Tables [rows]; a row that no call belonged to takes the nearest one that has values."""
        known = sorted(row for other, row in self.ends if other == name)
        ends = torch.stack([self.ends[name, min(known, key=lambda k: abs(k - row))] for row in range(rows)])
        return qparams_from_range(ends[:, 0], ends[:, 1], grid, symmetric=symmetric)


def running_tables(pair: Pair, chosen: dict[str, LayerDecision], seed: int) -> dict[str, QParams]:
    """Tables of all static activations: [R] for timestep-aware layers, [1] for the others.

    The calls are taken in random order: in sampling order the average would forget all steps but the last.
    """
    static = {name: d for name, d in chosen.items() if d.bits_a is not None and d.act_mode == "static"}
    averages, keys = Averages(), pair.step.keys
    for arguments in pair.calls.shuffled(seed):
        row = int((keys - timestep_of(arguments)).abs().argmin())
        with watched_inputs(pair.student, static, lambda name, x, row=row: averages.update(name, row * static[name].timestep_aware, x)):
            run_denoiser(pair.student, arguments)
    return {
        name: averages.params(name, len(keys) if d.timestep_aware else 1, IntGrid(d.bits_a or 8), symmetric=d.act_symmetric)
        for name, d in static.items()
    }
