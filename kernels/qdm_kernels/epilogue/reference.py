"""What follows y = float(sums) * scales + bias: activation, residual, and a cast or a rounding to the next layer's codes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qdm_kernels.quantize import reference as quantize

GATED = "geglu"
ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh", GATED)
OUT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)


@dataclass(frozen=True)
class Epilogue:
    """Options of a layer's output.

    activation: one of ACTIVATIONS, on float32; `geglu` takes outputs [value, gate] and leaves value * gelu(gate), half as many.
    residual: added after it, float, the shape of the output; None = nothing.
    out_dtype: one of OUT_DTYPES; int8 = codes of out_scale and out_zero_point, 8 bits, both tables where a step is given.
    step: int32 [1] on the device of the tables, the row of each; a table of one entry serves every step. None = no tables.
    """

    activation: str = "none"
    residual: Tensor | None = None
    out_dtype: torch.dtype = torch.float32
    out_scale: Tensor | None = None
    out_zero_point: Tensor | None = None
    step: Tensor | None = None

    def check(self, gated: int = 0) -> None:
        """ValueError on an unknown activation or type, or int8 without scale and zero point. gated: outputs to halve; 0 = cannot be."""
        if self.activation == GATED and (gated == 0 or gated % 2):
            raise ValueError(
                f"{GATED} halves the outputs of a linear layer with integer codes, " + (f"got {gated}" if gated else "of no other")
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, got {self.activation!r}")
        if self.out_dtype not in OUT_DTYPES:
            raise ValueError(f"an output is float32, bfloat16, float16 or int8, got {self.out_dtype}")
        if (self.out_dtype == torch.int8) != (self.out_scale is not None and self.out_zero_point is not None):
            raise ValueError("an int8 output takes out_scale and out_zero_point, another output neither")
        if self.step is not None and (self.step.numel() != 1 or self.step.dtype != torch.int32):
            raise ValueError(f"step is one int32, got {self.step.dtype} {tuple(self.step.shape)}")

    def width(self, outputs: int) -> int:
        """Entries of a finished row of a layer with so many outputs."""
        return outputs // 2 if self.activation == GATED else outputs

    @property
    def only_casts(self) -> bool:
        """Nothing but the output's floating-point type is left to do."""
        return self.activation == "none" and self.residual is None and self.out_dtype != torch.int8

    @property
    def only_adds(self) -> bool:
        """Nothing but a residual of the output's own type, float32 or bfloat16, is left to be added."""
        alike = self.residual is not None and self.residual.dtype == self.out_dtype in (torch.float32, torch.bfloat16)
        return self.activation == "none" and alike

    @property
    def plain(self) -> bool:
        """float32 and nothing else."""
        return self.activation == "none" and self.residual is None and self.out_dtype == torch.float32


def activate(y: Tensor, activation: str) -> Tensor:
    """One of ACTIVATIONS."""
    if activation == "silu":
        return F.silu(y)
    if activation in ("gelu", "gelu_tanh"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    if activation == GATED:
        value, gate = y.chunk(2, -1)
        return value * F.gelu(gate)
    return y


def finish(y: Tensor, epilogue: Epilogue) -> Tensor:
    """Apply an epilogue to float32 [..., N]; returns [..., width(N)] of `out_dtype`."""
    if epilogue.plain:
        return y
    y = activate(y, epilogue.activation)
    if epilogue.residual is not None:
        y = y + epilogue.residual.float()
    if epilogue.out_scale is None or epilogue.out_zero_point is None:
        return y.to(epilogue.out_dtype)
    scale, zero_point = (quantize.pick(table, epilogue.step) for table in (epilogue.out_scale, epilogue.out_zero_point))
    return quantize.quantize(y, scale, zero_point, 8)
