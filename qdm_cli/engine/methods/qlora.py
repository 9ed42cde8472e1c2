"""QLoRA (Dettmers et al., NeurIPS 2023, arXiv 2305.14314): low-rank float updates beside frozen integer weights; the rival of TuneQDM."""

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


class QloraConfig(AdaptConfig):
    """W = s (W_q - z) + alpha / r * B A: A and B train, through peft. The integer kernels do not run the update; export merges it."""

    method: Literal["qlora"] = "qlora"
    rank: int = Field(2, ge=1)
    """Rank r of the updates."""
    alpha: int | None = Field(None, ge=1)
    """Numerator of their scaling; null = r."""
    lr: float = Field(1e-3, gt=0)
    """Peak rate."""


@method(QloraConfig)
def qlora(
    denoiser: nn.Module, cfg: QloraConfig, ctx: RunContext, *, state: QuantState, inputs: AdaptInputs
) -> tuple[QuantState, dict[str, float]]:
    """Train updates of every quantized layer; returns the state with them, and metrics."""
    from qdm_cli.engine.quant.rivals import adapt_low_rank

    return adapt_low_rank(denoiser, cfg, ctx, state, inputs)
