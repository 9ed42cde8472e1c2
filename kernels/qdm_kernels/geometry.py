"""Shape of a convolution, shared by every backend."""

from dataclasses import dataclass, replace

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2dGeometry:
    """Stride, zero padding (both sides alike), dilation, groups."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1

    def unpadded(self) -> "Conv2dGeometry":
        """The same convolution for an input that already carries its border."""
        return replace(self, padding=(0, 0))
