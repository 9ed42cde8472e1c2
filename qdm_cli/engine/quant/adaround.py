"""AdaRound (Nagel et al., ICML 2020, arXiv 2004.10568) as Q-Diffusion uses it: learn for each weight whether it rounds up or down.

W_hat = s * clip(floor(W / s) + h(V), lo - z, hi - z),    h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from qdm_cli.engine.quant.grid import IntGrid, QParams, broadcast
from qdm_cli.engine.quant.modules import weight_granularity
from qdm_cli.engine.quant.state import LayerDecision

STRETCH, SHIFT = 1.2, 0.1
UNDECIDED = (0.01, 0.99)
"""h between these two bounds has not settled: its hard rounding can differ much from what was optimised."""


def rectified_sigmoid(v: torch.Tensor) -> torch.Tensor:
    """h(V) in [0, 1], any shape; reaches both ends exactly (Eq. 23 of AdaRound)."""
    return (STRETCH * torch.sigmoid(v) - SHIFT).clamp(0, 1)


def inverse_rectified_sigmoid(h: torch.Tensor) -> torch.Tensor:
    """V with h(V) = h, for h in [0, 1)."""
    return -torch.log(STRETCH / (h + SHIFT) - 1)


@dataclass(frozen=True)
class BetaSchedule:
    """Exponent of the regulariser over `iterations`: no regulariser in the first `warmup` share, then linear from `first` to `last`."""

    iterations: int
    warmup: float = 0.2
    first: float = 20.0
    last: float = 2.0

    def at(self, iteration: int) -> float | None:
        """Exponent at an iteration counted from 0; None = no regulariser yet."""
        start = self.warmup * self.iterations
        if iteration < start:
            return None
        progress = (iteration - start) / max(1.0, self.iterations - start)
        return self.last + (self.first - self.last) * (1 - progress)


def rounding_penalty(h: torch.Tensor, beta: float) -> torch.Tensor:
    """Sum over weights of 1 - |2h - 1|^beta: 0 when every weight has decided."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


class RoundedWeight(nn.Module):
    """A weight whose scale and zero point are fixed and whose rounding is learnt.

    Args:
        weight: float, [O, K] or [O, I/groups, kh, kw].
        params: scale and zero point, shapes by the decision's granularity; all ranges of a split weight are learnt alike.
    """

    def __init__(self, weight: torch.Tensor, decision: LayerDecision, params: QParams):
        super().__init__()
        self.grid = IntGrid(decision.bits_w)
        granularity = weight_granularity(decision)
        scale = broadcast(params.scale.float(), weight.shape, granularity)
        zero = broadcast(params.zero_point.float(), weight.shape, granularity)
        scaled = weight.detach().float() * scale.reciprocal()
        self.scale = params.scale.float()
        self.zero_point = zero
        self.floor = torch.floor(scaled)
        self.v = nn.Parameter(inverse_rectified_sigmoid(scaled - self.floor))

    @torch.no_grad()
    def lean_(self, codes: torch.Tensor, share: float) -> None:
        """Start from a mean of the float weight and the roundings of `codes`, which count `share`; 0 changes nothing."""
        if share:
            up = (codes.float() - self.zero_point - self.floor).clamp(0, 1)
            self.v.copy_(inverse_rectified_sigmoid((1 - share) * self.h() + share * up))

    def h(self) -> torch.Tensor:
        """Soft rounding, the weight's shape: 0 = down, 1 = up."""
        return rectified_sigmoid(self.v)

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(centred codes as floats, not yet integers; scale)."""
        return self._clip(self.floor + self.h()), self.scale

    @torch.no_grad()
    def hard_codes(self) -> torch.Tensor:
        """Signed int8 codes after every weight has decided (V >= 0 rounds up)."""
        return (self._clip(self.floor + (self.v >= 0)) + self.zero_point).to(torch.int8)

    @torch.no_grad()
    def undecided(self) -> torch.Tensor:
        """True where h is between 0.01 and 0.99, the weight's shape."""
        h = self.h()
        return (h > UNDECIDED[0]) & (h < UNDECIDED[1])

    def _clip(self, centred: torch.Tensor) -> torch.Tensor:
        return torch.minimum(torch.maximum(centred, self.grid.lo - self.zero_point), self.grid.hi - self.zero_point)
