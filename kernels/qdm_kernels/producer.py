"""What the fused producers of codes share: argument checks and the row of a per-channel factor."""

import torch
from torch import Tensor


def check_producer(
    x: Tensor, channels: int, gain: Tensor | None, step: Tensor | None, bits: int, scale: Tensor | None, zero_point: Tensor | None,
    *per_channel: Tensor | None,
) -> None:  # fmt: skip
    """ValueError unless x is floating point, tables come with their step, and gain and per_channel have one entry per channel."""
    if not x.is_floating_point() or x.dim() < 2:
        raise ValueError(f"x is floating point with at least two axes, got {x.dtype} {tuple(x.shape)}")
    if not 2 <= bits <= 8:
        raise ValueError(f"bits must be 2..8, got {bits}")
    if step is not None and (step.numel() != 1 or step.dtype != torch.int32):
        raise ValueError(f"step is one int32, got {step.dtype} {tuple(step.shape)}")
    for name, value in (("scale", scale), ("zero_point", zero_point)):
        if value is not None and value.numel() != 1 and step is None:
            raise ValueError(f"{name} is one element, or a table with a step, got {tuple(value.shape)}")
    if zero_point is not None and zero_point.is_floating_point():
        raise ValueError(f"zero_point is an integer tensor, got {zero_point.dtype}")
    for value in per_channel:
        if value is not None and value.shape != (channels,):
            raise ValueError(f"weight and bias have one entry per channel, [{channels}], got {tuple(value.shape)}")
    if gain is not None and (gain.shape[-1] != channels or gain.dim() > 2 or (gain.dim() == 2 and step is None)):
        raise ValueError(f"gain is [{channels}], or [S, {channels}] with a step, got {tuple(gain.shape)}")


def row_of(gain: Tensor | None, step: Tensor | None) -> Tensor | None:
    """Per-channel factors of a call: [C], or the step's row of [S, C]."""
    if gain is None or gain.dim() == 1 or step is None:
        return gain
    return gain.index_select(0, step.reshape(1)).reshape(-1)


def tables_of(scale: Tensor | None, zero_point: Tensor | None, step: Tensor | None) -> int:
    """Which of scale 1, zero point 2 a kernel indexes by the step."""
    return sum(1 << i for i, t in enumerate((scale, zero_point)) if step is not None and t is not None and t.numel() > 1)


def plain_floats(*tensors: Tensor | None) -> list[Tensor | None]:
    """Contiguous tensors of at most 32 bits, as kernels read them."""
    return [None if t is None else (t.float() if t.dtype == torch.float64 else t).contiguous() for t in tensors]


def traced(x: Tensor) -> bool:
    """Whether a producer is being compiled for a CPU: its plain operators are traced there, for inductor to fuse with what made x."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


def as_operator(x: Tensor) -> bool:
    """Whether a producer is one registered operator of a graph."""
    return torch.compiler.is_compiling() and x.device.type != "cpu"
