"""Generated images on disk, batch by batch: bounded memory, resumable, shared between suites and, for the base model, between runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from qdm_cli.engine.checkpoint import read_tensors, write_tensors
from qdm_cli.engine.errors import GateFailed

_UNIT = re.compile(r"(\d{8})-(\d{8})-(f32|u8)\.safetensors")


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[0, 1] floats -> 0..255, rounded, as an image file holds them."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8)


@dataclass(frozen=True)
class Unit:
    """One file with the samples [start, stop). `exact` = float32, else uint8."""

    start: int
    stop: int
    exact: bool
    path: Path


class SampleBank:
    """Images of one model and sampler; sample i was made from seed + i.

    Args:
        folder: made if absent. Files are written whole or not at all, so several processes may share it.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def units(self) -> list[Unit]:
        """Files present, by position."""
        matches = ((path, _UNIT.fullmatch(path.name)) for path in self.folder.iterdir())
        return sorted(
            (Unit(int(m[1]), int(m[2]), m[3] == "f32", path) for path, m in matches if m is not None),
            key=lambda unit: (unit.start, -unit.stop),
        )

    def unit_at(self, position: int, *, exact: bool) -> Unit | None:
        """The file that holds sample `position`, the one that reaches furthest; `exact` = only float32 ones."""
        fitting = [unit for unit in self.units() if unit.start <= position < unit.stop and (unit.exact or not exact)]
        return max(fitting, key=lambda unit: unit.stop, default=None)

    def fill(
        self,
        count: int,
        *,
        exact: int,
        batch: int,
        make: Callable[[int, int], torch.Tensor],
        name: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> None:
        """Generate what is missing of the samples [0, count).

        Args:
            exact: how many, from the first, are kept in float32; the rest takes a quarter of the disk as uint8.
            batch: samples per call of `make`.
            make: (start, n) -> images [n, C, H, W] f32 in [0, 1].
            name: of the model, for the message.

        Raises:
            GateFailed: an image holds NaN or infinity.
        """
        position = 0
        while position < count:
            unit = self.unit_at(position, exact=position < exact)
            if unit is None:
                self._write(position, make(position, min(batch, count - position)), exact=position < exact, name=name)
            else:
                position = unit.stop
            progress(min(position, count), count)

    def read(self, start: int, stop: int, *, exact: bool = False) -> torch.Tensor:
        """Samples [start, stop) as [N, C, H, W] f32; `exact` refuses those that were rounded to uint8.

        Raises:
            KeyError: some were never generated.
        """
        parts = []
        while start < stop:
            unit = self.unit_at(start, exact=exact)
            if unit is None:
                raise KeyError(f"{self.folder} holds no sample {start}")
            images = read_tensors(unit.path)[0]["images"][start - unit.start : stop - unit.start]
            parts.append(images if unit.exact else images.float() / 255)
            start += len(images)
        return torch.cat(parts)

    def batches(self, count: int, size: int = 64, *, exact: bool = False) -> Iterator[torch.Tensor]:
        """The samples [0, count), `size` at a time."""
        for start in range(0, count, size):
            yield self.read(start, min(start + size, count), exact=exact)

    def _write(self, start: int, images: torch.Tensor, *, exact: bool, name: str) -> None:
        finite = images.isfinite().flatten(1).all(1)
        if not finite.all():
            first = start + int((~finite).nonzero()[0])
            raise GateFailed(
                f"{name}: image {first} holds NaN or infinity ({int((~finite).sum())} of {len(images)} in its batch). "
                "The model diverges with this sampler; use more bits or fine-tune it."
            )
        kind = "f32" if exact else "u8"
        path = self.folder / f"{start:08d}-{start + len(images):08d}-{kind}.safetensors"
        write_tensors(path, {"images": images.float() if exact else to_uint8(images)})
