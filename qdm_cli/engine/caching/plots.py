"""Pictures of a schedule: errors of reuse over the steps, the Pareto curve, the strip of calls."""

from __future__ import annotations

import io
from typing import Any

import numpy as np

from qdm_cli.engine.caching.schedule import Schedule

FULL, PARTIAL, FAINT = "#4c6a92", "#c8553d", "#bbbbbb"
_CUT_COLOURS = (PARTIAL, "#7a9e7e", "#b59f3b", "#6b4c7a", "#2f6f73")


def heat_map(errors: np.ndarray, schedule: Schedule, cut: str) -> bytes:
    """PNG: similarity (1 - error) of the prediction at each call when it reuses the tensor of an earlier call, with the chosen reuses.

    Args:
        errors: [n, W] relative error at lag r of reusing the tensor of call i; NaN = not measured.
        cut: name of the cut, for the title.
    """
    calls, window = errors.shape
    square = np.full((calls, calls), np.nan)
    for lag in range(window):
        for start in range(calls - lag):
            square[start, start + lag] = 1 - errors[start, lag]
    figure, axes = _figure((6.4, 5.4))
    shown = axes.imshow(square, origin="lower", cmap="viridis", vmax=1, interpolation="nearest", aspect="equal")
    figure.colorbar(shown, ax=axes, label="similarity of the prediction (1 - relative error)")
    reused = [action for action in schedule.actions if action.action == "partial" and action.cut == cut]
    axes.plot([a.call for a in reused], [a.source for a in reused], "s", color=PARTIAL, markersize=max(1.5, 130 / calls), label="chosen")
    axes.set_xlabel("call that reuses (noise → image)")
    axes.set_ylabel("full call that is reused")
    axes.set_title(f"cut {cut}", fontsize=10)
    if reused:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    return _png(figure)


def pareto_chart(schedule: Schedule, uncached_ms: float) -> bytes:
    """PNG: predicted cost over speed-up of all schedules on the curve, the chosen one marked.

    Args:
        uncached_ms: denoiser time of the uncached trajectory.
    """
    figure, axes = _figure((6.4, 3.6))
    points = [point for point in schedule.pareto if point.cost > 0]
    axes.plot([uncached_ms / point.latency_ms for point in points], [point.cost for point in points], ".-", color=FULL, label="best plans")
    chosen = schedule.predicted
    if chosen is not None and chosen.cost and chosen.speedup:
        axes.plot([chosen.speedup], [chosen.cost], "o", color=PARTIAL, label="chosen")
    if points:
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    axes.set_xlabel("denoiser speed-up (measured per call)")
    axes.set_ylabel("predicted error of the last latent")
    return _png(figure)


def strip(schedule: Schedule) -> bytes:
    """PNG: one bar per call, full or the cut that it reuses."""
    figure, axes = _figure((8.2, 1.5))
    colours = {cut.id: _CUT_COLOURS[index % len(_CUT_COLOURS)] for index, cut in enumerate(schedule.cuts)}
    for name, colour, chosen in (
        ("full", FULL, [action.call for action in schedule.actions if action.action == "full"]),
        *(
            (f"reuses {cut}", colour, [action.call for action in schedule.actions if action.action == "partial" and action.cut == cut])
            for cut, colour in colours.items()
        ),
    ):
        if chosen:
            axes.bar(chosen, [1.0 if name == "full" else 0.55] * len(chosen), width=0.9, color=colour, label=name)
    axes.set_yticks([])
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("call (noise → image)")
    axes.legend(frameon=False, fontsize=7, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 1.35))
    return _png(figure)


def _figure(size: tuple[float, float]) -> Any:
    """(figure, axes) without pyplot, whose global state outlives the call and asks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # without the fixed metadata the file names the version of matplotlib
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
