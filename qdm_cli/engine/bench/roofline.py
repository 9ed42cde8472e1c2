"""What a layer could take at best, and what the model of the kernel specification (3.2) expects of a tiled GPU kernel."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from qdm_cli.engine.bench.shapes import LayerShape


@dataclass(frozen=True)
class Roof:
    """Ceilings of a device: multiply-adds count two operations. None = unknown.

    Attributes:
        float_ops, int8_ops: operations per second; float in `float_dtype`.
        bytes_per_s: of memory.
        source: published or measured here.
    """

    float_ops: float | None
    int8_ops: float | None
    bytes_per_s: float | None
    float_dtype: str
    source: str


_H100 = Roof(989e12, 1979e12, 3.0e12, "bfloat16", "published dense peak, measured copy speed")
PUBLISHED = {"H100": _H100, "H200": Roof(989e12, 1979e12, 4.3e12, "bfloat16", _H100.source)}


def moved_bytes(shape: LayerShape, *, x: float, w: float, y: float) -> float:
    """Bytes of input, weight and output, each touched once, for these bytes per element."""
    pixels = shape.rows * (shape.stride**2 if shape.op == "conv2d" else 1)
    return pixels * shape.inputs * x + shape.outputs * shape.terms * w + shape.rows * shape.outputs * y


def roofline_s(shape: LayerShape, roof: Roof, bits_w: int | None, float_bytes: int) -> float | None:
    """Seconds at the ceiling, the slower of arithmetic and memory. bits_w None = float operands of `float_bytes`."""
    ops = roof.float_ops if bits_w is None else roof.int8_ops
    if ops is None or roof.bytes_per_s is None:
        return None
    x, w = (float_bytes, float_bytes) if bits_w is None else (1, bits_w / 8)
    return max(2 * shape.macs / ops, moved_bytes(shape, x=x, w=w, y=float_bytes) / roof.bytes_per_s)


TILES = ((128, 128), (128, 256), (64, 128), (256, 128), (64, 64))
SPLITS = (1, 2, 4, 8)
EFFICIENCY = {"bf16": 0.80, "w8a8": 0.62, "w4a8": 0.52, "w4a16": 0.62}
MULTIPROCESSORS, MEMORY = 132, 3.0e12
LAUNCH_S, LAUNCH_ALONE_S, QUANTIZE_S = 1.0e-6, 2.5e-6, 1.5e-6


def expected_h100_s(shape: LayerShape, kernel: str, *, alone: bool = True) -> float:
    """Seconds on an H100 by the model of specification 3.2: waves of tiles against memory, best tile and split of K.

    kernel: bf16, w8a8, w4a8 or w4a16. alone: launched by itself rather than inside a model. A model, not a measurement.
    """
    peak = (1979e12 if kernel in ("w8a8", "w4a8") else 989e12) * EFFICIENCY[kernel] / MULTIPROCESSORS
    element = {"bf16": (2, 2), "w8a8": (1, 1), "w4a8": (1, 0.5), "w4a16": (2, 0.5)}[kernel]
    best = float("inf")
    for bm, bn in TILES:
        for splits in SPLITS:
            waves = ceil(ceil(shape.rows / bm) * ceil(shape.outputs / bn) * splits / MULTIPROCESSORS)
            tile = 2 * bm * bn * (shape.terms / splits + 256) / peak
            extra = 4 * shape.rows * shape.outputs * splits if splits > 1 else 0
            best = min(best, max(waves * tile, (moved_bytes(shape, x=element[0], w=element[1], y=2) + extra) / MEMORY))
    return best + (LAUNCH_ALONE_S if alone else LAUNCH_S)


def quantize_h100_s(shape: LayerShape) -> float:
    """Seconds of a separate quantization pass by the same model: bf16 read, int8 written."""
    return 3 * shape.rows * shape.terms / shape.kernel**2 / MEMORY + QUANTIZE_S
