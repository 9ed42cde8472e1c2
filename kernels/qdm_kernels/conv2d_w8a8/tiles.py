"""Which tile a convolution gets: measured entries where there are some, else a rule (README: Tiles)."""

from functools import cache
from pathlib import Path

import torch

from qdm_kernels.gemm.tiles import GROUP_M, TMA_TILES, Plan, Tile, bucket, measured, processors, user_file, why_not_tma

__all__ = ["GROUP_M", "TILES", "choose_conv_plan", "fits_conv", "register_cap"]

# Eight warps at 128 registers, or four at 255, let two programs share a multiprocessor.
TILES = (
    Tile(128, 128, 128, 4, 3, since=90),
    Tile(128, 128, 128, 8, 3, 128, since=90),
    Tile(128, 128, 64, 8, 4, 128),
    Tile(128, 64, 128, 4, 3, since=90),
    Tile(128, 64, 64, 4, 4),
    Tile(64, 128, 128, 4, 3, since=90),
    Tile(64, 64, 128, 4, 4, since=90),
    Tile(64, 64, 64, 4, 4),
)
_SHARE_BLOCKS = 8  # least channel blocks of one split: shorter loops do not fill the pipeline
_MOST_SPLITS = 8


def choose_conv_plan(op: str, m: int, n: int, taps: int, channels: int, device: torch.device, *, dense: bool = True) -> Plan:
    """Plan for m output pixels, n filters, and so many taps and (padded) input channels. A device without CUDA counts as an H100.

    dense: strides of 1, which the copy engine needs.
    """
    capability, count = processors(device)
    return _plan(op, bucket(m), n, taps, channels, capability, count, user_file(), dense)


@cache
def _plan(op: str, m: int, n: int, taps: int, channels: int, capability: int, count: int, file: Path | None, dense: bool) -> Plan:
    found = measured(op, m, n, taps * channels, capability, file)
    if found is not None and fits_conv(found.tile, channels) and (dense or not found.tile.tma):
        return found
    tile = choose_tile(m, n, channels, count, capability, tma=dense and why_not_tma(capability) is None)
    return Plan(tile, choose_splits(m, n, taps * channels // tile.bk, tile, count))


def fits_conv(tile: Tile, channels: int) -> bool:
    """Does a block of the tile stay within one tap?"""
    return channels % tile.bk == 0


def choose_tile(m: int, n: int, channels: int, count: int, capability: int, *, tma: bool = False) -> Tile:
    """Tile without measurements for a GPU of `count` multiprocessors; capability: 90 = 9.0; tma: by the copy engine.

    128 filters where they waste at most a fifth (192 is the one common width where they do not), 64 pixels where 128 leave processors idle.
    """
    bn = 128 if _count(n, 128) * 128 <= 1.2 * n else 64
    bk = 128 if channels % 128 == 0 and capability >= 90 else 64
    bm = 128
    if _count(m, 128) * _count(n, bn) < count:
        bn = 64
        bm = 128 if _count(m, 128) * _count(n, 64) >= count else 64
    return next(t for t in (TMA_TILES if tma else TILES) if (t.bm, t.bn, t.bk) == (bm, bn, bk))


def register_cap(tile: Tile, taps: int, wide: bool) -> int | None:
    """Registers per thread that a tile is compiled with; None = the compiler's. One tap, or 64-bit offsets, spill at the tile's."""
    return None if taps == 1 or wide else tile.registers


def choose_splits(m: int, n: int, blocks: int, tile: Tile, count: int) -> int:
    """Into how many shares K is cut so that a small grid fills the GPU; 1 = not at all. blocks: channel blocks over all taps."""
    tiles = _count(m, tile.bm) * _count(n, tile.bn)
    return max(1, min(count // max(tiles, 1), blocks // _SHARE_BLOCKS, _MOST_SPLITS))


def _count(size: int, block: int) -> int:
    return -(-size // block)
