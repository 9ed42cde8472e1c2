"""Activation ranges as moving averages of smallest and largest value (Q-Diffusion, quantization spec 1.2 `running`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from qdm_cli.engine.diffusion.trajectories import timestep_of
from qdm_cli.engine.errors import GateFailed
from qdm_cli.engine.quant.calibration import input_parts, join_parts, parts_of, run_denoiser, watched_inputs
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

    def note(name: str, x: torch.Tensor) -> None:
        decision = static[name]
        for part, values in zip(parts_of(decision), input_parts(x, decision), strict=True):
            averages.update(part, row if decision.timestep_aware else 0, values)

    static = {name: d for name, d in chosen.items() if d.bits_a is not None and d.act_mode == "static"}
    averages, keys = Averages(), pair.step.keys
    for arguments in pair.calls.shuffled(seed):
        row = int((keys - timestep_of(arguments)).abs().argmin())
        with watched_inputs(pair.student, static, note):
            run_denoiser(pair.student, arguments)
    return {name: _joined(averages, decision, len(keys) if decision.timestep_aware else 1) for name, decision in static.items()}


def _joined(averages: Averages, decision: LayerDecision, rows: int) -> QParams:
    grid = IntGrid(decision.bits_a or 8)
    return join_parts([averages.params(part, rows, grid, symmetric=decision.act_symmetric) for part in parts_of(decision)])
