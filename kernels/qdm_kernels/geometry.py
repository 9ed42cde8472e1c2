"""Shape of a convolution, shared by every backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2dGeometry:
    """Stride, zero padding (both sides alike), dilation, groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation"):
            pair = tuple(getattr(self, name))
            if len(pair) != 2:
                raise ValueError(f"{name} is (rows, columns), got {pair}")
            object.__setattr__(self, name, pair)

    def unpadded(self) -> "Conv2dGeometry":
        """The same convolution for an input that already carries its border."""
        return replace(self, padding=(0, 0))

    def is_pointwise(self, kernel: Sequence[int]) -> bool:
        """Does a kernel of these sides see one pixel of every position, over all channels?"""
        return tuple(kernel) == (1, 1) == self.stride and self.padding == (0, 0) and self.groups == 1
