"""Fine-tuning in full precision: no compression, but the yardstick that adapting a quantized model is measured against."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from qdm_cli.engine.methods import method
from qdm_cli.engine.quant.scale_config import AdaptConfig

if TYPE_CHECKING:
    from torch import nn

    from qdm_cli.engine.context import RunContext
    from qdm_cli.engine.quant.scale_adapt import AdaptInputs
    from qdm_cli.engine.quant.state import QuantState


class FullConfig(AdaptConfig):
    """Every parameter of the float model trains, with the images, updates and draws of the other methods; export is dequantized."""

    method: Literal["full"] = "full"
    lr: float = Field(1e-4, gt=0)
    """Peak rate."""


@method(FullConfig)
def full(
    denoiser: nn.Module, cfg: FullConfig, ctx: RunContext, *, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train all parameters; returns a state without quantized layers, and metrics."""
    from qdm_cli.engine.quant.rivals import adapt_full

    return adapt_full(denoiser, cfg, ctx, state, inputs, lr=cfg.lr)
