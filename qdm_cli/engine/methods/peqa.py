"""PEQA (Kim et al., NeurIPS 2023, arXiv 2305.14152): adapt a quantized model by its weight scales alone, one per output channel."""

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


class PeqaConfig(AdaptConfig):
    """W = s (W_q - z): only s trains. With grouped weight scales s multiplies those of all groups of a channel."""

    method: Literal["peqa"] = "peqa"
    lr: float = Field(1e-2, gt=0)
    """Peak rate of the logarithm of the scales."""


@method(PeqaConfig)
def peqa(
    denoiser: nn.Module, cfg: PeqaConfig, ctx: RunContext, *, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train one scale per output channel of every quantized layer; returns the state with its scale set, and metrics."""
    import torch

    from qdm_cli.engine.quant.scale_adapt import ScalePlan, adapt_scales

    plan = ScalePlan("peqa", torch.zeros(1, dtype=torch.float64), input_scales=False, output_rate=cfg.lr, input_rate=cfg.lr)
    return adapt_scales(denoiser, cfg, ctx, plan, state, inputs)
