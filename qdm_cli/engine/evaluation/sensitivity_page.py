"""sensitivity.html: the table of `calibrate.sensitivity` as one page that loads nothing from elsewhere."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from qdm_cli.engine.evaluation.report import number, template
from qdm_cli.engine.quant.sensitivity import LayerErrors, Sensitivity, WidthErrors

_SHADES = ((234, 242, 234), (250, 240, 205), (240, 190, 175))
"""Green to red over the decades of the whole table."""
_LINE_WIDTH, _LINE_HEIGHT = 60, 14

Pick = Callable[[WidthErrors], float | None]


def render_page(table: Sensitivity) -> str:
    """The page."""
    picks: list[tuple[str, str, Pick]] = [
        ("Error of the final image", "Relative L2 error of the final latent at equal seeds, this layer's weight alone quantized.", _image),
        ("Error of the layer's output", "Relative L2 error, weight quantized, input in full precision.", _output),
        ("Error by the layer's input", "Relative L2 error of the output, input quantized with one range per step.", _activation),
        ("Weight SQNR, dB", "Signal to quantization noise of the weight; more is better.", _sqnr),
    ]
    shown = [(title, note, pick) for title, note, pick in picks if any(pick(e) is not None for layer in table.layers for e in layer.widths)]
    return template("sensitivity.html").render(
        title=f"Sensitivity of {len(table.layers)} layers",
        subtitle=_subtitle(table),
        widths=[entry.bits for entry in table.layers[0].widths] if table.layers else [],
        tables=[{"title": title, "note": note, "rows": _rows(table, pick, falls=pick is not _sqnr)} for title, note, pick in shown],
        rules="\n".join(f"- {json.dumps(rule)}" for rule in table.rules),
    )


def _subtitle(table: Sensitivity) -> str:
    steps = ", ".join(f"{t:g}" for t in table.timesteps)
    measured = f"{table.samples} inputs at timesteps {steps}; weight ranges by {table.init}."
    return f"{measured} A frame marks the bits that the policy or quantize.auto gives."


def _image(entry: WidthErrors) -> float | None:
    return entry.image_error


def _output(entry: WidthErrors) -> float | None:
    return entry.output_error


def _activation(entry: WidthErrors) -> float | None:
    return entry.activation_error


def _sqnr(entry: WidthErrors) -> float | None:
    return entry.weight_sqnr_db


def _rows(table: Sensitivity, pick: Pick, *, falls: bool) -> list[dict[str, Any]]:
    """`falls`: smaller is better, shaded on a logarithmic scale."""
    values = [value for layer in table.layers for entry in layer.widths if (value := pick(entry)) is not None and (value > 0 or not falls)]
    scaled = [math.log10(value) if falls else -value for value in values] or [0.0]
    low, high = min(scaled), max(scaled)
    return [_row(layer, pick, falls, low, high) for layer in table.layers]


def _row(layer: LayerErrors, pick: Pick, falls: bool, low: float, high: float) -> dict[str, Any]:
    cells = []
    for entry in layer.widths:
        value = pick(entry)
        place = None if value is None or (falls and value <= 0) else (math.log10(value) if falls else -value)
        share = None if place is None else (place - low) / max(high - low, 1e-12)
        cells.append({"text": number(value), "colour": None if share is None else _colour(share), "own": entry.bits == layer.bits_w})
    widest = max((high - low for low, high in layer.input_ranges), default=0.0)
    ends = (min((low for low, _ in layer.input_ranges), default=0.0), max((high for _, high in layer.input_ranges), default=0.0))
    return {
        "name": layer.name,
        "role": layer.role,
        "shape": "x".join(map(str, layer.shape)),
        "numel": f"{math.prod(layer.shape):,}",
        "range": f"{ends[0]:.3g} .. {ends[1]:.3g}" if layer.input_ranges else "not reached",
        "line": _line([high - low for low, high in layer.input_ranges], widest),
        "cells": cells,
    }


def _colour(share: float) -> str:
    """0 = best, 1 = worst."""
    place = min(max(share, 0.0), 1.0) * (len(_SHADES) - 1)
    left = min(int(place), len(_SHADES) - 2)
    mixed = (round(a + (b - a) * (place - left)) for a, b in zip(_SHADES[left], _SHADES[left + 1], strict=True))
    return "rgb({}, {}, {})".format(*mixed)


def _line(widths: list[float], widest: float) -> str:
    """Width of the input range over the measured timesteps, image to noise, as points of a polyline; empty = one timestep."""
    if len(widths) < 2 or widest <= 0:
        return ""
    step = _LINE_WIDTH / (len(widths) - 1)
    return " ".join(f"{k * step:.1f},{_LINE_HEIGHT - 1 - (_LINE_HEIGHT - 2) * width / widest:.1f}" for k, width in enumerate(widths))
