"""`qdm bench --tune`: measured tiles for layers of this GPU, in the user's own file, where every later process finds them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from qdm_cli.engine.bench.shapes import LayerShape, parse_shapes
from qdm_cli.engine.errors import EnvironmentProblem, InputError
from qdm_kernels.gemm import tiles, tune

FEW_ROWS = 16  # up to here a layer waits for its weights, and the weight-only kernels serve it


def tune_layers(shapes: Iterable[str], bits: Iterable[int], *, device: str, seconds: float, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure candidate tiles of layers, each behind its gate, until the time is used up, and keep the best in `tiles.user_path()`.

    An entry serves every resolution of its power of two of rows. Layers of strides have no candidates to choose from. The object holds
    the file, one row per layer with its time and the bf16 baseline's, and how many layers were not reached.

    Raises:
        InputError: unknown shapes or bits.
        EnvironmentProblem: no CUDA device.
    """
    if not device.startswith("cuda") or not torch.cuda.is_available():
        raise EnvironmentProblem(
            "--tune measures the Triton kernels of a CUDA GPU, and there is none: tiles come from the model of the time"
        )
    problems = problems_of((shape for text in shapes for shape in parse_shapes(text)), bits)
    torch.backends.cudnn.benchmark = True
    rows: list[dict[str, Any]] = []
    where, workers = tiles.user_path(), max(1, (os.cpu_count() or 2) - 2)
    with torch.no_grad():
        for result in tune.tuned(problems, torch.device(device), seconds, workers):
            rows.append(result)
            entries = [row["entry"] for row in rows if row["entry"] is not None]
            tune.write(where, entries, torch.device(device))
            say(tune.line(result))
    return {"file": str(where), "device": torch.cuda.get_device_name(device), "rows": rows, "not_reached": len(problems) - len(rows)}


def problems_of(shapes: Iterable[LayerShape], bits: Iterable[int]) -> list[tune.Problem]:
    """What the tuner measures for these layers, each once, in their order. InputError on other bits than 8 and 4."""
    wanted = sorted(set(bits), reverse=True)
    if bad := [b for b in wanted if b not in (8, 4)]:
        raise InputError(f"--bits {bad[0]}: kernels read weights of 8 or 4 bits")
    found = [
        tune.Problem(
            b, shape.rows, shape.outputs, shape.inputs, shape.kernel if shape.op == "conv2d" else 0, shape.batch, shape.rows <= FEW_ROWS
        )
        for shape in shapes
        if shape.stride == 1
        for b in wanted
    ]
    return list(dict.fromkeys(found))
