"""Random odd shapes and their integer truth: the same draws for every backend, the interpreter and the GPU.

    for case in linear_cases(200, bits=4):
        x, w, z_w = case.draw()
        assert torch.equal(accumulate(x, case.z_x, ...), case.truth(x, w, z_w))

Rows, outputs and inputs stand around the edges of tiles (1, tile - 1, tile, tile + 1); every seventh case is extreme: all codes at an end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.geometry import Conv2dGeometry

CODES = (-128, 0, 9, 127)  # activation zero points
INPUTS = (1, 3, 16, 31, 48, 63, 64, 65, 80, 96, 127, 128, 129, 192, 200, 256, 320, 333)
SIZES = (1, 2, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 100, 127, 128, 129, 130)
GEOMETRIES = (  # kernel, geometry
    ((3, 3), Conv2dGeometry(padding=(1, 1))),
    ((3, 3), Conv2dGeometry(stride=(2, 2), padding=(1, 1))),
    ((3, 3), Conv2dGeometry(stride=(2, 2), padding_end=(1, 1))),  # diffusers' downsampler: pad below and to the right
    ((1, 1), Conv2dGeometry()),
    ((1, 1), Conv2dGeometry(stride=(2, 2))),
    ((5, 2), Conv2dGeometry(padding=(3, 1), dilation=(2, 2))),
)


@dataclass(frozen=True)
class LinearCase:
    """rows, outputs, inputs: M, N, K. centred: weights have no zero point. extreme: every code at an end of its range."""

    rows: int
    outputs: int
    inputs: int
    bits: int
    z_x: int
    centred: bool
    extreme: bool
    seed: int

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """x int8 [M, K], weight codes int8 [N, K], weight zero points int32 [N]."""
        return _draw((self.rows, self.inputs), (self.outputs, self.inputs), self.bits, self.centred, self.extreme, self.seed, device)

    def truth(self, x: Tensor, w: Tensor, z_w: Tensor) -> Tensor:
        """int32 [M, N] from float64, exact below 2^53."""
        return ((x.double() - self.z_x) @ (w.double() - z_w.double()[:, None]).T).to(torch.int32)


@dataclass(frozen=True)
class ConvCase:
    """x: B, I, H, W."""

    x: tuple[int, int, int, int]
    filters: int
    kernel: tuple[int, int]
    geometry: Conv2dGeometry
    bits: int
    z_x: int
    centred: bool
    extreme: bool
    seed: int

    def draw(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """x int8 [B, I, H, W], weight codes int8 [O, I, kh, kw], weight zero points int32 [O]."""
        weight = (self.filters, self.x[1], *self.kernel)
        return _draw(self.x, weight, self.bits, self.centred, self.extreme, self.seed, device)

    def truth(self, x: Tensor, w: Tensor, z_w: Tensor) -> Tensor:
        """int32 [B, O, H', W'] from windows and a float64 product: no convolution algorithm of a library takes part."""
        g = self.geometry
        real = F.pad(x.double() - self.z_x, g.border)
        windows = F.unfold(real, self.kernel, g.dilation, 0, g.stride)
        sums = (w.double() - z_w.double().view(-1, 1, 1, 1)).flatten(1) @ windows
        return sums.unflatten(2, g.output_size(self.x[2:], self.kernel)).to(torch.int32)


def _draw(
    x: tuple[int, ...], w: tuple[int, ...], bits: int, centred: bool, extreme: bool, seed: int, device: str
) -> tuple[Tensor, Tensor, Tensor]:
    rng, limit = torch.Generator().manual_seed(seed), 1 << bits - 1
    if extreme:
        codes = torch.full(x, -128 if seed % 2 else 127, dtype=torch.int8), torch.full(w, -limit, dtype=torch.int8)
    else:
        codes = (
            torch.randint(-128, 128, x, generator=rng, dtype=torch.int8),
            torch.randint(-limit, limit, w, generator=rng, dtype=torch.int8),
        )
    zero = torch.randint(-limit, limit, (w[0],), generator=rng, dtype=torch.int32) * (not centred)
    return codes[0].to(device), codes[1].to(device), zero.to(device)


def linear_cases(count: int, bits: int, *, largest: int = 130) -> list[LinearCase]:
    """Random cases; the first has one row. largest: of rows and outputs."""
    rng = random.Random(bits)
    sizes = [size for size in SIZES if size <= largest]
    cases = []
    for i in range(count):
        rows = 1 if i == 0 else rng.choice([*sizes, rng.randint(1, 2 * largest)])
        outputs, inputs = rng.choice([*sizes, rng.randint(1, largest)]), rng.choice([*INPUTS, rng.randint(1, 700)])
        cases.append(LinearCase(rows, outputs, inputs, bits, CODES[i % 4], centred=i % 3 > 0, extreme=i % 7 == 6, seed=i))
    return cases


def conv_cases(count: int, bits: int, *, largest: int = 130, channels: tuple[int, ...] = (16, 48, 64, 80, 128, 192)) -> list[ConvCase]:
    """Random cases over `GEOMETRIES`; channels: of the input. largest: filters."""
    rng = random.Random(bits)
    sizes = [size for size in SIZES if size <= largest]
    cases = []
    for i in range(count):
        kernel, geometry = GEOMETRIES[i % len(GEOMETRIES)]
        shape = (rng.randint(1, 3), rng.choice(channels), rng.choice([1, 2, 5, 8, 9, 16]), rng.choice([1, 3, 7, 8, 16]))
        if kernel == (3, 3) and geometry.padding == (0, 0):  # the smallest image that such a kernel fits
            shape = (*shape[:2], max(shape[2], 2), max(shape[3], 2))
        if kernel == (5, 2):
            shape = (*shape[:2], max(shape[2], 3), shape[3])
        case = ConvCase(shape, rng.choice(sizes), kernel, geometry, bits, CODES[i % 4], i % 3 > 0, i % 7 == 6, i)
        cases.append(case)
    return cases
