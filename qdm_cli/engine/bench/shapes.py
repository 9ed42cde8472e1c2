"""Layer shapes of the models qdm is measured on, at their published sizes (traced with diffusers; kernel specification 4)."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from math import isqrt
from typing import Any, Literal

from qdm_cli.engine.errors import InputError


@dataclass(frozen=True)
class LayerShape:
    """One layer of a model at one batch.

    Attributes:
        rows: M of the matrix product: tokens, or output pixels of a convolution.
        inputs, outputs: features or channels.
        kernel: side of a convolution; 1 for a linear layer.
        side: output height and width of a convolution whose rows are batch * side^2; 0 for a linear layer.
        count: how often the model has it.
        capped_from: rows of the model where they were cut to fit the time at hand; None = as in the model.
    """

    model: str
    layer: str
    op: Literal["linear", "conv2d"]
    rows: int
    inputs: int
    outputs: int
    kernel: int = 1
    stride: int = 1
    side: int = 0
    count: int = 1
    capped_from: int | None = None

    @property
    def terms(self) -> int:
        """Products per output, K."""
        return self.inputs * self.kernel**2

    @property
    def macs(self) -> int:
        return self.rows * self.terms * self.outputs

    @property
    def batch(self) -> int:
        return self.rows // self.side**2 if self.side else self.rows

    def to_dict(self) -> dict[str, Any]:
        """Fields that are not the default of their class."""
        return {name: value for name, value in asdict(self).items() if value not in (None, 0)}


def _linear(model: str, layer: str, m: int, n: int, k: int, count: int) -> LayerShape:
    return LayerShape(model, layer, "linear", m, k, n, count=count)


def _conv(
    model: str, layer: str, batch: int, side: int, inputs: int, outputs: int, count: int, kernel: int = 3, stride: int = 1
) -> LayerShape:
    return LayerShape(model, layer, "conv2d", batch * side**2, inputs, outputs, kernel, stride, side, count)


MODELS: dict[str, tuple[LayerShape, ...]] = {
    "sd15": (
        _conv("sd15", "conv3 320 @64", 2, 64, 320, 320, 7),
        _conv("sd15", "conv3 640 @32", 2, 32, 640, 640, 6),
        _conv("sd15", "conv3 1280 @16", 2, 16, 1280, 1280, 7),
        _conv("sd15", "conv3 2560 to 1280 @16", 2, 16, 2560, 1280, 2),
        _conv("sd15", "conv3 640 to 320 @64", 2, 64, 640, 320, 2),
        _conv("sd15", "conv3 1280 @8", 2, 8, 1280, 1280, 11),
        _conv("sd15", "conv3 320 stride 2", 2, 32, 320, 320, 1, stride=2),
        _conv("sd15", "conv1 320 @64", 2, 64, 320, 320, 10, kernel=1),
        _linear("sd15", "GEGLU proj @64", 8192, 2560, 320, 5),
        _linear("sd15", "GEGLU proj @32", 2048, 5120, 640, 5),
        _linear("sd15", "GEGLU proj @16", 512, 10240, 1280, 5),
        _linear("sd15", "FF out @64", 8192, 320, 1280, 5),
        _linear("sd15", "FF out @32", 2048, 640, 2560, 5),
        _linear("sd15", "FF out @16", 512, 1280, 5120, 5),
        _linear("sd15", "q,k,v,out @64", 8192, 320, 320, 30),
        _linear("sd15", "q,k,v,out @32", 2048, 640, 640, 30),
        _linear("sd15", "q,k,v,out @16", 512, 1280, 1280, 30),
        _linear("sd15", "cross k,v @16", 154, 1280, 768, 12),
        _linear("sd15", "time embedding", 2, 1280, 1280, 22),
    ),
    "sdxl": (
        _linear("sdxl", "GEGLU proj @32", 2048, 10240, 1280, 60),
        _linear("sdxl", "q,k,v,out @32", 2048, 1280, 1280, 372),
        _linear("sdxl", "fused QKV @32", 2048, 3840, 1280, 60),
        _linear("sdxl", "FF out @32", 2048, 1280, 5120, 60),
        _linear("sdxl", "GEGLU proj @64", 8192, 5120, 640, 10),
        _linear("sdxl", "FF out @64", 8192, 640, 2560, 10),
        _linear("sdxl", "q,k,v,out @64", 8192, 640, 640, 70),
        _conv("sdxl", "conv3 320 @128", 2, 128, 320, 320, 7),
        _conv("sdxl", "conv3 640 @64", 2, 64, 640, 640, 6),
        _conv("sdxl", "conv3 1280 @32", 2, 32, 1280, 1280, 10),
    ),
    "ldm4": (
        _conv("ldm4", "conv3 192 @64", 2, 64, 192, 192, 7),
        _conv("ldm4", "conv3 384 @32", 2, 32, 384, 384, 6),
        _conv("ldm4", "conv3 576 @16", 2, 16, 576, 576, 6),
        _conv("ldm4", "conv3 960 @8", 2, 8, 960, 960, 10),
        _linear("ldm4", "GEGLU proj @32", 2048, 3072, 384, 5),
        _linear("ldm4", "GEGLU proj @16", 512, 4608, 576, 5),
        _linear("ldm4", "GEGLU proj @8", 128, 7680, 960, 6),
        _linear("ldm4", "attention @32", 2048, 384, 384, 40),
        _linear("ldm4", "attention @16", 512, 576, 576, 40),
        _linear("ldm4", "attention @8", 128, 960, 960, 16),
    ),
    "dit256": (
        _linear("dit256", "q,k,v,out", 512, 1152, 1152, 112),
        _linear("dit256", "fc1", 512, 4608, 1152, 28),
        _linear("dit256", "fc2", 512, 1152, 4608, 28),
        _linear("dit256", "adaLN", 2, 6912, 1152, 28),
    ),
    "dit512": (
        _linear("dit512", "q,k,v,out", 2048, 1152, 1152, 112),
        _linear("dit512", "fc1", 2048, 4608, 1152, 28),
        _linear("dit512", "fc2", 2048, 1152, 4608, 28),
    ),
    "flux": (
        _linear("flux", "single proj_out", 4608, 3072, 15360, 38),
        _linear("flux", "single proj_mlp", 4608, 12288, 3072, 38),
        _linear("flux", "single q,k,v", 4608, 3072, 3072, 114),
        _linear("flux", "double q,k,v,out", 4096, 3072, 3072, 76),
        _linear("flux", "double ff1", 4096, 12288, 3072, 19),
        _linear("flux", "double ff2", 4096, 3072, 12288, 19),
        _linear("flux", "text ff1", 512, 12288, 3072, 19),
        _linear("flux", "adaLN double", 1, 18432, 3072, 38),
        _linear("flux", "adaLN single", 1, 9216, 3072, 38),
    ),
}

_LINEAR = re.compile(r"linear:(\d+)x(\d+)x(\d+)")
_CONV = re.compile(r"conv2d:(\d+)x(\d+)x(\d+)x(\d+)(?:k(\d))?(?:s(\d))?")


def parse_shapes(text: str) -> tuple[LayerShape, ...]:
    """Shapes of one argument: a model's name, `all`, `linear:MxNxK`, or `conv2d:BATCHxCHANNELSxSIDExFILTERS[kKERNEL][sSTRIDE]`.

    SIDE is of the output. Raises InputError for anything else and for sizes of 0.
    """
    if text == "all":
        return tuple(shape for shapes in MODELS.values() for shape in shapes)
    if text in MODELS:
        return MODELS[text]
    linear, conv = _LINEAR.fullmatch(text), _CONV.fullmatch(text)
    if linear:
        m, n, k = map(int, linear.groups())
        found = _linear("own", text, m, n, k, 1)
    elif conv:
        batch, inputs, side, outputs = map(int, conv.groups()[:4])
        found = _conv("own", text, batch, side, inputs, outputs, 1, int(conv[5] or 3), int(conv[6] or 1))
    else:
        known = f"{', '.join(MODELS)}, all, linear:MxNxK or conv2d:BATCHxCHANNELSxSIDExFILTERS[kKERNEL][sSTRIDE]"
        raise InputError(f"{text}: neither a folder of `qdm export` nor shapes ({known})")
    if found.macs == 0 or found.kernel % 2 == 0 or found.stride == 0:
        raise InputError(f"{text}: sizes and strides are at least 1, and the side of a kernel is odd")
    return (found,)


def capped(shape: LayerShape, macs: int | None) -> LayerShape:
    """The layer with fewer rows, so that it takes at most `macs` multiply-adds; None = as it is."""
    if macs is None or shape.macs <= macs:
        return shape
    rows = max(macs // (shape.terms * shape.outputs), 1)
    if shape.op == "linear":
        return replace(shape, rows=min(rows, shape.rows), capped_from=shape.rows)
    side = min(max(isqrt(rows), 1), shape.side)
    return replace(shape, rows=side**2, side=side, capped_from=shape.rows)
