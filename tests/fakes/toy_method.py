"""A calibration method that lives outside qdm: its module, and one line of the table of methods."""

from __future__ import annotations

from typing import Any, Literal

from qdm_cli.engine.methods import method
from qdm_cli.engine.methods._shared import CalibrateConfig


class ToyConfig(CalibrateConfig):
    """Weights rounded to nearest, activations left alone."""

    method: Literal["toy"] = "toy"
    shrink: float = 1.0
    """Factor of every weight scale."""


@method(ToyConfig)
def toy(denoiser: Any, cfg: ToyConfig, ctx: Any, *, decisions: list[Any], **unused: Any) -> Any:
    """Codes of every chosen layer."""
    from dataclasses import replace

    from qdm_cli.engine.quant.calibration import RangeRule, code_layer
    from qdm_cli.engine.quant.state import QuantState

    coded = {d.name: code_layer(denoiser.get_submodule(d.name), d, RangeRule("max"), None) for d in decisions if not d.skipped_why}
    layers = {name: replace(layer, weight_scale=layer.weight_scale * cfg.shrink) for name, layer in coded.items()}
    return QuantState(layers, tuple(d for d in decisions if d.skipped_why))
