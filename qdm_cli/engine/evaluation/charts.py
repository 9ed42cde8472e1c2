"""Pictures of a report: the side-by-side grid, errors per timestep, errors per layer."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw

BASE_COLOUR, OWN_COLOUR = "#4c6a92", "#c8553d"
BITS_COLOURS = {2: "#6b4c7a", 3: "#b59f3b", 4: OWN_COLOUR, 5: "#999999", 6: "#7a9e7e", 7: "#333333", 8: BASE_COLOUR}
_CELL_PIXELS = 96
_LABEL_PIXELS = 78
_GAP = 4
DIFFERENCE_GAIN = 4.0
"""Differences are shown times four: at 8 bits they are invisible otherwise."""


def to_picture(image: torch.Tensor) -> Image.Image:
    """[C, H, W] f32 in [0, 1], 1 or 3 channels -> 8-bit picture."""
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def difference_map(image: torch.Tensor, reference: torch.Tensor) -> Image.Image:
    """Absolute difference, mean over channels, times four, on a black-to-yellow scale; [C, H, W] f32."""
    size = ((image - reference).abs().mean(0) * DIFFERENCE_GAIN).clamp(0, 1).numpy()
    colours = np.stack([size, size**1.6 * 0.85, size * (1 - size) * 0.7], axis=-1)
    return Image.fromarray((colours * 255).round().astype(np.uint8))


def image_grid(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """One labelled row per entry. Small images are enlarged by a whole factor, large ones reduced to 256 pixels."""
    first = next(iter(rows.values()))[0]
    width, height = _cell_size(first.size)
    columns = max(len(pictures) for pictures in rows.values())
    canvas = Image.new("RGB", (_LABEL_PIXELS + columns * (width + _GAP), len(rows) * (height + _GAP)), "white")
    pen = ImageDraw.Draw(canvas)
    for y, (label, pictures) in enumerate(rows.items()):
        top = y * (height + _GAP)
        pen.multiline_text((2, top + height // 2 - 6 * (1 + label.count("\n"))), label, fill="black")
        for x, picture in enumerate(pictures):
            mode = Image.Resampling.NEAREST if width > picture.width else Image.Resampling.LANCZOS
            canvas.paste(picture.convert("RGB").resize((width, height), mode), (_LABEL_PIXELS + x * (width + _GAP), top))
    return canvas


def _cell_size(size: tuple[int, int]) -> tuple[int, int]:
    width, height = size
    if width > 256:
        return 256, round(height * 256 / width)
    factor = max(1, _CELL_PIXELS // width)
    return width * factor, height * factor


def png_bytes(picture: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def timestep_chart(rows: list[dict[str, Any]]) -> bytes:
    """PNG: relative error of x_t and of the prediction over the denoising steps, from noise to image.

    Args:
        rows: `Trace.rows()`.
    """
    figure, axes = _figure(height=3.4)
    calls = range(len(rows))
    style = {"marker": "o", "markersize": 3}
    axes.plot(calls, [row["noise_error"] for row in rows], color=BASE_COLOUR, label="prediction on the base model's x_t", **style)
    axes.plot(calls, [row["latent_error"] for row in rows], color=OWN_COLOUR, label="x_t on the own trajectory", **style)
    places = [k for k in calls if k % max(1, len(rows) // 10) == 0]
    axes.set_xticks(places, [f"{rows[k]['timestep']:g}" for k in places])
    axes.set_xlabel("timestep (noise → image)")
    axes.set_ylabel("relative L2 error")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def layer_chart(rows: list[dict[str, Any]]) -> bytes:
    """PNG: per quantized layer, in model order, SQNR of the weight, relative error of the output, and bits.

    Args:
        rows: `layer_rows()`; those of skipped layers are left out.
    """
    rows = [row for row in rows if row["output_error"] is not None or row["weight_sqnr_db"] is not None]
    figure, (top, bottom) = _figure(height=5.2, panels=2)
    places = list(range(len(rows)))
    bits = [row["bits_w"] for row in rows]
    for value in sorted(set(bits)):
        chosen = [k for k in places if bits[k] == value]
        colour = BITS_COLOURS[value]
        top.bar(chosen, [rows[k]["weight_sqnr_db"] or 0 for k in chosen], color=colour, label=f"{value}-bit weights")
        bottom.bar(chosen, [rows[k]["output_error"] or 0 for k in chosen], color=colour)
    top.set_ylabel("weight SQNR, dB")
    bottom.set_ylabel("relative output error")
    shown = places[:: max(1, len(places) // 40)]
    bottom.set_xticks(shown, [_short(rows[k]["name"]) for k in shown], rotation=90, fontsize=5)
    top.set_xticks([])
    top.legend(frameon=False, fontsize=8, ncols=4)
    return _png(figure)


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:12] + "…" + name[-21:]


def _figure(*, height: float, panels: int = 1) -> Any:
    """A figure without pyplot, whose global state outlives the call and asks for a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(panels, 1)
    for panel in np.atleast_1d(axes):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        panel.set_axisbelow(True)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # without the fixed metadata the file names the version of matplotlib
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
