"""Loops over blocks that stay in the second-level cache: several passes over one block cost less than one pass over memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK_BYTES = 1 << 19  # of float32 scratch per thread; half of the smallest second-level cache of a core that this was measured on


def block_of(row_elements: int) -> int:
    """Rows of a block, at least one."""
    return max(torch.get_num_threads() * BLOCK_BYTES // 4 // max(row_elements, 1), 1)


def slices(rows: int, block: int) -> Iterator[slice]:
    """[0, rows) in blocks; nothing for no rows."""
    return (slice(start, min(start + block, rows)) for start in range(0, rows, block))


def in_memory_order(x: Tensor) -> Tensor | None:
    """A flat view of a dense tensor, contiguous or channels_last; None = neither."""
    if x.is_contiguous():
        return x.view(-1)
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


def pixels(x: Tensor) -> Tensor:
    """[B, H * W, C] view of an image [B, C, H, W] that is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)
