"""Tile shapes of the Triton convolution: which are shipped, and which one a layer gets without tuning (README: Tiles)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Output pixels x filters x channels of one program, warps, pipeline stages.

    registers: cap per thread, None = the compiler's. since: least compute capability; 128 channels of a 128 x 128 tile spill before 9.0.
    """

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    registers: int | None = None
    since: int = 80

    def __str__(self) -> str:
        return f"{self.bm}x{self.bn}x{self.bk}"


# Eight warps at 128 registers let two programs share a multiprocessor.
TILES = (
    Tile(128, 128, 128, 8, 3, 128, since=90),
    Tile(128, 128, 64, 8, 4, 128),
    Tile(128, 64, 128, 4, 3, since=90),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 64, 128, 4, 4, since=90),
    Tile(64, 64, 64, 4, 4),
)
GROUP_M = 8
_SHARE_BLOCKS = 8  # least channel blocks of one split: shorter loops do not fill the pipeline
_MOST_SPLITS = 8


def choose_tile(m: int, n: int, channels: int, processors: int, capability: int) -> Tile:
    """Tile for m output pixels, n filters and (padded) input channels on a GPU of so many multiprocessors; capability: 90 = 9.0.

    128 filters where they divide n or waste little of it (192, 320, 576 and 960 do not), 64 pixels where 128 leave processors idle.
    """
    bn = 128 if n % 128 == 0 or n > 1024 else 64
    bk = 128 if channels % 128 == 0 and capability >= 90 else 64
    bm = 128
    if _count(m, 128) * _count(n, bn) < processors:
        bn = 64
        bm = 128 if _count(m, 128) * _count(n, 64) >= processors else 64
    return next(t for t in TILES if (t.bm, t.bn, t.bk) == (bm, bn, bk))


def choose_splits(m: int, n: int, blocks: int, tile: Tile, processors: int) -> int:
    """Into how many shares K is cut so that a small grid fills the GPU; 1 = not at all. blocks: channel blocks over all taps."""
    tiles = _count(m, tile.bm) * _count(n, tile.bn)
    return max(1, min(processors // max(tiles, 1), blocks // _SHARE_BLOCKS, _MOST_SPLITS))


def _count(size: int, block: int) -> int:
    return -(-size // block)
