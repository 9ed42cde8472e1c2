"""Shape of a convolution, shared by every backend."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

Pair = tuple[int, int]


@dataclass(frozen=True)
class Conv2dGeometry:
    """Stride, zero padding, dilation, groups. padding_end: padding below and to the right; None = as `padding`, above and to the left."""

    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    padding_end: Pair | None = None

    def __post_init__(self) -> None:
        for name in ("stride", "padding", "dilation", "padding_end"):
            value = getattr(self, name)
            pair = tuple(self.padding if value is None else value)
            if len(pair) != 2:
                raise ValueError(f"{name} is (rows, columns), got {pair}")
            object.__setattr__(self, name, pair)

    @property
    def symmetric(self) -> bool:
        """The same padding on opposite sides."""
        return self.padding == self.padding_end

    @property
    def border(self) -> tuple[int, int, int, int]:
        """Padding as `torch.nn.functional.pad` takes it: left, right, top, bottom."""
        (top, left), (bottom, right) = self.padding, self.padding_end or self.padding
        return left, right, top, bottom

    def has_windows_of_padding(self, kernel: Pair) -> bool:
        """May an output see no pixel of the input, in an image of some size? oneDNN 3.12 then reads memory that is not its own."""
        left, right, top, bottom = self.border
        sides = ((max(top, bottom), kernel[0], self.dilation[0]), (max(left, right), kernel[1], self.dilation[1]))
        return any(pad >= d * (k - 1) + 1 or (pad > 0 and k > 1 and d > 1) for pad, k, d in sides)

    def unpadded(self) -> "Conv2dGeometry":
        """The same convolution for an input that already carries its border."""
        return replace(self, padding=(0, 0), padding_end=(0, 0))

    def output_size(self, size: Pair, kernel: Pair) -> Pair:
        """Rows and columns of the output. ValueError when the kernel does not fit the padded input."""
        left, right, top, bottom = self.border
        padded = size[0] + top + bottom, size[1] + left + right
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, kernel, strict=True)]
        if padded[0] < reach[0] or padded[1] < reach[1]:
            raise ValueError(f"the kernel reaches over {reach[0]}x{reach[1]} pixels, the padded input has {padded[0]}x{padded[1]}")
        return (padded[0] - reach[0]) // self.stride[0] + 1, (padded[1] - reach[1]) // self.stride[1] + 1

    def is_pointwise(self, kernel: Sequence[int]) -> bool:
        """Does a kernel of these sides see one pixel of every position, over all channels?"""
        return tuple(kernel) == (1, 1) == self.stride and not any(self.border) and self.groups == 1
